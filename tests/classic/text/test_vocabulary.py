"""Words of texts as rows."""

import numpy as np
import pytest

from llm_jax.classic.text import document_terms
from llm_jax.classic.text.vocabulary import PAD, UNKNOWN, Words, WordsError, count


def test_rows_are_padded_and_cut():
    words = Words(["cat", "the", "cat", "<unk>"], "blanks")
    assert words.words == ["<pad>", "<unk>", "cat", "the"] and len(words) == 4
    ids, cut = words.encode(["the cat <pad>", "", "the dog saw the cat"], 3)
    np.testing.assert_array_equal(ids, [[3, 2, UNKNOWN], [PAD] * 3, [3, UNKNOWN, UNKNOWN]])
    assert ids.dtype == np.int32 and cut == 1
    assert words.encode([], 3)[0].shape == (0, 1) and words.encode(["", "cat"], 3)[0].tolist() == [[PAD], [2]]


def test_counts():
    assert count(["a b a", "b", ""], "blanks") == {"a": 2, "b": 2} and not count([], "words")


def test_treebank_cuts_marks_and_contractions():
    want = [
        "it",
        "does",
        "n't",
        "work",
        ",",
        "'s",
        "and",
        "well-made",
        ";",
        "we",
        "'ll",
        "-lrb-",
        "3",
        ".",
        "5",
        "-rrb-",
    ]
    got = document_terms.treebank("It doesn't work, 's and well-made; we'll -LRB- 3.5 -RRB-")
    assert got == want
    assert document_terms.treebank(" ".join(want)) == got  # what is cut already stays so
    assert document_terms.treebank("Été 'sofa' can't cannot") == ["été", "'", "sofa", "'", "ca", "n't", "cannot"]


def test_bad_input():
    with pytest.raises(WordsError, match="a vocabulary of no word"):
        Words(["<pad>"], "blanks")
    with pytest.raises(WordsError, match="tokenize='x' is not one of words, blanks, treebank"):
        Words(["a"], "x")
