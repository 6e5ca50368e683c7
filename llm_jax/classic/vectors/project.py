"""Word vectors laid into the embedding table of another vocabulary."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors


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
    def found(self) -> int:
        """Number of words that have a vector."""
        return self.exact + self.lowered

    @property
    def share(self) -> float:
        """Share of the words that have a vector."""
        return self.found / self.words


def look_up(
    words: Sequence[str], vectors: WordVectors, counts: Sequence[int] | np.ndarray | None = None
) -> tuple[np.ndarray, Coverage]:
    """(rows of the words in `vectors`, `[V']`, -1 where there is none; their coverage). See `embed`."""
    exact = np.array([vectors.index.get(w, -1) for w in words], int)
    lowered = np.array([vectors.index.get(w.lower(), -1) for w in words], int)
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
    first = int((exact >= 0).sum())
    return rows, Coverage(first, int(found.sum()) - first, len(words), occurrences)


def resize(matrix: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Vectors of another width whose products with one another change least.

    Wider ones have zeros behind, and the same products. Narrower ones are their coordinates along the directions that
    hold most of their squared length: of all matrices of that width none gives closer products (Eckart and Young 1936).

    Args:
      matrix: `[V, D]`.
      width: D'.

    Returns:
      Float32 `[V, D']`, and the share of their squared length that is kept.

    Raises:
      VectorsError: for a width below 1.
    """
    if width < 1:
        raise VectorsError(f"width={width} is below 1")
    wide = np.asarray(matrix, np.float64)
    if width >= wide.shape[1]:
        return np.pad(wide, ((0, 0), (0, width - wide.shape[1]))).astype(np.float32), 1.0
    values, directions = np.linalg.eigh(wide.T @ wide)  # ascending
    kept = float(values[-width:].sum() / max(values.sum(), np.finfo(float).tiny))
    return (wide @ directions[:, : -width - 1 : -1]).astype(np.float32), kept


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
    rows, coverage = look_up([spell(w) for w in words], vectors, counts)
    found = rows >= 0
    known = vectors.matrix[rows[found]]
    table = rng.normal(0, known.std(dtype=np.float64), (len(words), known.shape[1])).astype(np.float32)
    table[found] = known
    return table, coverage
