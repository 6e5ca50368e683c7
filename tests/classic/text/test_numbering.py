"""Numbers of words against bytes.split and a dictionary."""

import numpy as np
import pytest

from llm_jax.classic.text import numbering
from llm_jax.classic.text.numbering import LINE_END, NO_WORD, Numbers


def by_dictionary(lines, numbers):
    words = lines.replace(LINE_END, b" ").replace(b"\n", b" \0 ").split()
    return [numbers.setdefault(w, len(numbers)) for w in words]


def drawn(seed, count, kinds, longest):
    """Lines of words of bytes but blanks, whose beginnings are often the same."""
    rng = np.random.default_rng(seed)
    letters = np.setdiff1d(np.arange(1, 256), list(b" \t\n\r\v\f"))
    stem = rng.choice(letters, longest + 1).astype(np.uint8).tobytes()
    words = []
    for length in rng.integers(1, longest + 1, kinds):
        kept = rng.integers(0, length)
        words.append(
            stem[:kept] + rng.choice(letters[: rng.choice([2, 240])], length - kept).astype(np.uint8).tobytes()
        )
    blanks = [b" ", b"\n", b"\t \t", b" \n\n\r", b"\0", b"\v\f\n"]
    return (
        b"".join(words[i] + blanks[j] for i, j in zip(*rng.integers(0, [[kinds], [6]], (2, count)), strict=True))
        + b"\n"
    )


@pytest.mark.parametrize(("kinds", "longest"), [(30, 8), (5000, 9), (20000, 30), (300, 200)])
@pytest.mark.parametrize("piece", [100, numbering.PIECE])
def test_equal_to_a_dictionary_block_after_block(kinds, longest, piece):
    numbers, reference = Numbers(piece), {LINE_END: 0}
    for seed in range(3):
        lines = drawn(seed, 4000 if piece > 100 else 800, kinds, longest)
        assert numbers.read(lines).tolist() == by_dictionary(lines, reference)
        assert numbers.words == list(reference)


def test_lengths_around_eight_bytes():
    text = b" ".join(b"a" * n for n in range(1, 140)) + b"\n"
    numbers = Numbers()
    for _ in range(2):
        assert numbers.read(text).tolist() == [*range(1, 140), 0]


def test_words_that_all_begin_their_search_in_one_slot(monkeypatch):
    monkeypatch.setattr(Numbers, "_slots", lambda self, before, eight: np.full(len(eight), len(self._rows) - 2))
    numbers, reference, lines = Numbers(), {LINE_END: 0}, drawn(0, 800, 200, 20)
    assert numbers.read(lines).tolist() == by_dictionary(lines, reference)
    assert numbers.read(lines).tolist() == by_dictionary(lines, reference)


def test_no_new_words():
    numbers = Numbers()
    numbers.read(b"a longer_than_eight " + b"x" * 70 + b"\n")
    numbers.grows = False
    beginnings = b"longer_t longer_than_eight longer_than_nine b " + b"x" * 69 + b" " + b"x" * 70 + b" a\n"
    assert numbers.read(beginnings).tolist() == [NO_WORD, 2, NO_WORD, NO_WORD, NO_WORD, 3, 1, 0]
    ends = b"zzzzzzzza longer_tzzzzzzzza zzzzzzzzzzzzzzzza longer_than_eightlonger_than_eight han_eight\n"
    assert numbers.read(ends).tolist() == [NO_WORD] * 5 + [0]
    assert len(numbers.words) == 4


@pytest.mark.parametrize("longest", [9, 30, 100])
def test_words_of_a_vocabulary_among_others(longest):
    """Others are made of the vocabulary's own pieces of eight bytes."""
    known = drawn(0, 3000, 400, longest)
    numbers, reference = Numbers(), {LINE_END: 0}
    numbers.read(known)
    by_dictionary(known, reference)
    numbers.grows = False
    rng, words = np.random.default_rng(1), list(reference)[1:]
    pieces = [w[i : i + 8] for w in words for i in range(0, len(w), 8)]
    others = [b"".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(1, 5))) for _ in range(5000)]
    asked = [*others, *words]
    expected = [reference.get(w, NO_WORD) for w in asked]
    assert 0 < expected.count(NO_WORD) < len(others)
    assert numbers.read(b" ".join(asked) + b"\n").tolist() == [*expected, 0]


def test_no_text_and_a_line_beyond_a_piece():
    numbers = Numbers(10)
    assert numbers.read(b"").tolist() == []
    assert numbers.read(b"\n" + b"word " * 30 + b"\na\n").tolist() == [0, *[1] * 30, 0, 2, 0]
