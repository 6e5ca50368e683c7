"""Pre-trained vectors in the table of another vocabulary."""

import numpy as np
import pytest

from llm_jax.classic.vectors.project import embed
from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors

VECTORS = WordVectors(["the", "The", "cat", "dog"], 3 * np.random.default_rng(0).normal(size=(4, 50)))


def test_rows():
    words = ["The", "CAT", "<unk>", "the", "none"] + [f"x{i}" for i in range(200)]
    table, coverage = embed(words, VECTORS, np.random.default_rng(0), counts=[5, 2, 1, 1, 1] + [0] * 200)
    assert table.dtype == np.float32 and table.shape == (205, 50)
    np.testing.assert_array_equal(table[[0, 1, 3]], VECTORS.matrix[[1, 2, 0]])
    assert coverage[:3] == (2, 1, 205) and coverage.share == 3 / 205 and coverage.occurrences == pytest.approx(0.8)
    drawn = table[[2, *range(4, 205)]]
    assert drawn.std() == pytest.approx(VECTORS.matrix[:3].std(), rel=0.02) and abs(drawn.mean()) < 0.1
    again, _ = embed(words, VECTORS, np.random.default_rng(0))
    np.testing.assert_array_equal(again, table)
    other, coverage = embed(words, VECTORS, np.random.default_rng(1))
    assert (other[2] != table[2]).all() and coverage.occurrences is None


def test_entries_with_marks():
    table, coverage = embed(["_the", "_cat"], VECTORS, np.random.default_rng(0), spell=lambda w: w.removeprefix("_"))
    np.testing.assert_array_equal(table, VECTORS.matrix[[0, 2]])
    assert coverage.share == 1


def test_bad_input():
    rng = np.random.default_rng(0)
    for words in (["x", "y"], []):
        with pytest.raises(VectorsError, match=f"none of {len(words)} words .* has a vector"):
            embed(words, VECTORS, rng)
    for counts in ([1], [0, 0], [1, -1]):
        with pytest.raises(VectorsError, match="of 2 words: expected one each, none below 0, not all 0"):
            embed(["the", "x"], VECTORS, rng, counts=counts)
