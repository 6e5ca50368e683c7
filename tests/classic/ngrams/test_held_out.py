"""The last tenth of a text, and the words that only it holds."""

import numpy as np
import pytest

from llm_jax.classic.ngrams import held_out
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN, Vocabulary


def test_words_that_only_the_end_holds_are_unknown():
    vocabulary = Vocabulary(["a", "b", "c"])
    text = np.array([BEGIN, 3, 5, 5, END, BEGIN, 4, 3, 0, END])
    short, again = held_out.known_before(vocabulary, text, 5)
    assert short.words[3:] == ["c", "a"]
    assert again.tolist() == [BEGIN, 4, 3, 3, END, BEGIN, UNKNOWN, 4, UNKNOWN, END]
    assert held_out.known_before(vocabulary, text, 5, min_count=2)[0].words[3:] == ["c"]


def test_the_last_tenth():
    assert held_out.last_tenth(np.array([BEGIN, 3, END] * 25)) == (66, 3)
    with pytest.raises(ValueError, match="fewer than ten sentences"):
        held_out.last_tenth(np.array([BEGIN, 3, END] * 9))
