"""Word vectors: nearest words, similarities, analogies.

Cosines are products of unit vectors, in float32 and in blocks, so that scores of a large vocabulary take little memory.
Source of the analogies: Levy and Goldberg 2014, "Linguistic Regularities in Sparse and Explicit Word Representations",
https://aclanthology.org/W14-1618: 3CosAdd is equation 3; 3CosMul equation 4, on cosines moved to 0 to 1 (footnote 7).
"""

from collections.abc import Collection, Sequence

import numpy as np

METHODS = ("3cosadd", "3cosmul")
EPSILON = 1e-3  # of the paper; gensim has 1e-6
SCORES = 1 << 24  # that are computed at once


class VectorsError(ValueError):
    """Word vectors that cannot be read, or do not hold what is asked; one line that says why and where."""


class WordVectors:
    """Words with a vector each.

    Attributes:
      words: by row, most frequent first where that is known.
      matrix: their vectors, float32 `[V, D]`.
      unit: the same of length 1; zero stays zero.
      index: rows by word.
    """

    def __init__(self, words: Sequence[str], matrix: np.ndarray) -> None:
        """Checks and normalises.

        Args:
          words: V of them, all different.
          matrix: `[V, D]`.

        Raises:
          VectorsError: for other shapes, no word, a word that stands twice, numbers that are not finite.
        """
        self.words, self.matrix = list(words), np.asarray(matrix, np.float32)
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.words) or not self.matrix.size:
            raise VectorsError(f"{len(self.words):,} words with a matrix {self.matrix.shape}: expected a row each")
        self.index = {w: i for i, w in enumerate(self.words)}
        if len(self.index) < len(self.words):
            twice = next(w for i, w in enumerate(self.words) if self.index[w] != i)
            raise VectorsError(f"{twice!r} stands twice among the words")
        with np.errstate(over="ignore"):
            norms = np.linalg.norm(self.matrix, axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            row = int(np.argmin(np.isfinite(norms)))
            raise VectorsError(f"the vector of {self.words[row]!r} holds numbers that are not finite, or too large")
        self.unit = self.matrix / np.where(norms > 0, norms, 1)

    def __len__(self) -> int:
        return len(self.words)

    def row(self, word: str) -> int:
        """Where a word stands.

        Raises:
          VectorsError: for an unknown word.
        """
        if word not in self.index:
            other = next((w for w in (word.lower(), word.capitalize(), word.upper()) if w in self.index), None)
            hint = f"; {other!r} is" if other else ""
            raise VectorsError(f"{word!r} is not among the {len(self):,} words{hint}")
        return self.index[word]

    def similarity(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Cosines of P pairs of words, float32 `[P]`.

        Raises:
          VectorsError: for an unknown word.
        """
        a, b = (self.unit[[self.row(pair[side]) for pair in pairs]] for side in (0, 1))
        return (a * b).sum(1)

    def nearest(self, query: str | np.ndarray, top: int = 10, exclude: Collection[str] = ()) -> list[tuple[str, float]]:
        """The words of the highest cosines.

        Args:
          query: a word, which is not among its own nearest, or a vector `[D]`.
          top: how many at most.
          exclude: words that are not wanted; unknown ones are none.

        Raises:
          VectorsError: for an unknown word, a vector of another width, or `top` below 1.
        """
        if isinstance(query, str):
            exclude = [query, *exclude]
            query = self.matrix[self.row(query)]
        return self.search(np.asarray(query)[None], top, [exclude])[0]

    def search(
        self,
        queries: np.ndarray,
        top: int = 10,
        exclude: Sequence[Collection[str]] | None = None,
        max_scores: int = SCORES,
    ) -> list[list[tuple[str, float]]]:
        """`nearest` of many vectors at once.

        Args:
          queries: `[Q, D]`.
          top: how many at most, each.
          exclude: words that are not wanted, for each query.
          max_scores: computed at once.

        Raises:
          VectorsError: for queries of another width or not finite, or `top` below 1.
        """
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.matrix.shape[1] or not np.isfinite(queries).all():
            raise VectorsError(f"queries {queries.shape}: expected finite vectors of {self.matrix.shape[1]} numbers")
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        queries = queries / np.where(norms > 0, norms, 1)
        found, step = [], max(max_scores // len(self), 1)
        for begin in range(0, len(queries), step):
            scores = queries[begin : begin + step] @ self.unit.T
            for i, row in enumerate(scores, start=begin):
                found.append(self._best(row, top, exclude[i] if exclude else ()))
        return found

    def _best(self, scores: np.ndarray, top: int, exclude: Collection[str]) -> list[tuple[str, float]]:
        """The words of the highest scores; `scores` is written to."""
        if top < 1:
            raise VectorsError(f"top={top} is below 1")
        barred = {self.index[w] for w in exclude if w in self.index}
        scores[list(barred)] = -np.inf
        top = min(top, len(scores) - len(barred))
        best = np.argpartition(-scores, top - 1)[:top] if top else np.zeros(0, int)
        best = best[np.lexsort((best, -scores[best]))]
        return [(self.words[i], float(scores[i])) for i in best]

    def analogy(
        self, a: str, b: str, c: str, top: int = 10, method: str = "3cosadd", epsilon: float = EPSILON
    ) -> list[tuple[str, float]]:
        """The words that are to `c` what `b` is to `a`, and their scores; never one of the three.

        Args:
          a: as `man`.
          b: as `king`.
          c: as `woman`.
          top: how many at most.
          method: `3cosadd`, scored by the cosine with b - a + c of unit vectors, or `3cosmul`.
          epsilon: of 3CosMul, in the denominator.

        Raises:
          VectorsError: for an unknown word or method, or `top` below 1.
        """
        units = self.unit[[self.row(w) for w in (a, b, c)]]
        if method == "3cosadd":
            return self.nearest(units[1] - units[0] + units[2], top, (a, b, c))
        return self._best(combine(*(units @ self.unit.T), method, epsilon), top, (a, b, c))


def combine(a: np.ndarray, b: np.ndarray, c: np.ndarray, method: str, epsilon: float = EPSILON) -> np.ndarray:
    """Scores of candidates for an analogy, from their cosines with its three words; of one shape.

    3CosAdd's are not divided by the length of b - a + c, which ranks the same.

    Raises:
      VectorsError: for an unknown method.
    """
    if method == "3cosadd":
        return b - a + c
    if method == "3cosmul":
        return (1 + b) * (1 + c) / (2 * (1 + a) + 4 * epsilon)  # each (1 + x) / 2
    raise VectorsError(f"method={method!r} is not one of {', '.join(METHODS)}")
