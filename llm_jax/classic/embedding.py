"""Word vectors laid into the embedding table of another vocabulary."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.classic.vectors import VectorsError, WordVectors


class Coverage(NamedTuple):
    """How much of a vocabulary has a pre-trained vector.

    Attributes:
      exact: words found as they are.
      lowered: words found in lower case only.
      words: all.
      occurrences: share of the text's words that have one, None where no counts were given.
    """

    exact: int
    lowered: int
    words: int
    occurrences: float | None

    @property
    def share(self) -> float:
        """Of the words."""
        return (self.exact + self.lowered) / self.words


def embed(
    words: Sequence[str],
    vectors: WordVectors,
    rng: np.random.Generator,
    counts: Sequence[int] | np.ndarray | None = None,
    spell: Callable[[str], str] = str,
) -> tuple[np.ndarray, Coverage]:
    """An embedding table: a word's vector, else that of the word in lower case, else drawn.

    What is drawn is normal, of mean 0 and the standard deviation of the numbers that were found.

    Args:
      words: V' entries of the vocabulary, by row.
      vectors: pre-trained ones, of D numbers.
      rng: draws the others.
      counts: occurrences of each entry, `[V']`, for the coverage.
      spell: an entry's word, as where entries carry marks of where they stand.

    Returns:
      The table, float32 `[V', D]`, and its coverage.

    Raises:
      VectorsError: where no word is found, or `counts` are of another length, negative, or all zero.
    """
    spelled = [spell(w) for w in words]
    exact = np.array([vectors.index.get(w, -1) for w in spelled], int)
    lowered = np.array([vectors.index.get(w.lower(), -1) for w in spelled], int)
    rows = np.where(exact >= 0, exact, lowered)
    found = rows >= 0
    if not found.any():
        some = ", ".join(map(repr, words[:3]))
        raise VectorsError(
            f"none of {len(words):,} words ({some}, ...) has a vector: is it another language or layout?"
        )
    occurrences = None
    if counts is not None:
        counts = np.asarray(counts)
        if counts.shape != found.shape or (counts < 0).any() or not counts.sum():
            raise VectorsError(
                f"counts {counts.shape} of {len(words):,} words: expected one each, none below 0, not all 0"
            )
        occurrences = float(counts[found].sum() / counts.sum())
    known = vectors.matrix[rows[found]]
    table = rng.normal(0, known.std(dtype=np.float64), (len(words), known.shape[1])).astype(np.float32)
    table[found] = known
    first = int((exact >= 0).sum())
    return table, Coverage(first, int(found.sum()) - first, len(words), occurrences)
