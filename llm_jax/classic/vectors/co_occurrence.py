"""Words as rows of numbers: one-hot, counts of the words around them, PPMI and SVD of those.

A word's context vector is its row of `cooccurrences`. Counts of texts beyond memory are in `streamed_co_occurrence`.

Sources: Church and Hanks 1990 (PMI); Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons
Learned from Word Embeddings", https://aclanthology.org/Q15-1016 (shift, smoothing, exponent).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from llm_jax.classic.text.sentences import BEGIN, SPECIAL

WEIGHTINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "flat": lambda distances, window: np.ones(len(distances), np.int64),
    "harmonic": lambda distances, window: 1.0 / distances,  # GloVe
    "linear": lambda distances, window: (window - distances + 1) / window,  # word2vec's drawn windows, on average
}


class CountsError(ValueError):
    """Counts or vectors that cannot be made; one line that says why."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Which words are together, and how much that counts.

    A pair is a 64-bit number, `row << bits | column`; before pairs are added up their distance stands behind it, where
    it matters. Sorting such numbers is faster than any way to add in place.

    Attributes:
      size: V.
      width: words to either side.
      weighting: what a pair counts for at distance d: `flat` 1, `harmonic` 1 / d, `linear` (width - d + 1) / width.
    """

    size: int
    width: int
    weighting: str = "flat"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise CountsError(f"weighting={self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if self.width < 1:
            raise CountsError(f"window={self.width} must be at least 1 word")
        if 2 * self.bits + self.distance_bits > 63:
            raise CountsError(f"pairs of {self.size:,} words in a window of {self.width:,} do not fit 64 bits")

    @property
    def bits(self) -> int:
        """Bits of a word's number."""
        return (self.size - 1).bit_length()

    @property
    def distance_bits(self) -> int:
        """Bits of a distance in a pair's key."""
        return 0 if self.weighting == "flat" else self.width.bit_length()

    def keys(self, text: np.ndarray, symmetric: bool) -> Iterator[np.ndarray]:
        """Pairs with their distances, one array a distance; the smaller word is the row if `symmetric`, else the left.

        Raises:
          CountsError: for a text that does not begin with `BEGIN`, or words beyond the vocabulary.
        """
        if not len(text) or text[0] != BEGIN:
            raise CountsError("the text is empty or does not begin with <s>: take it from sentences.read")
        if text.min() < 0 or text.max() >= self.size:
            raise CountsError(f"words {text.min()} to {text.max()} are not all in the vocabulary of size={self.size}")
        at = np.arange(len(text), dtype=np.int32 if len(text) < 2**31 else np.int64)
        is_word = text >= len(SPECIAL)
        since = np.where(is_word, at - np.maximum.accumulate(np.where(text == BEGIN, at, 0)), 0)  # words since <s>
        for distance in range(1, min(self.width, int(since.max()) - 1) + 1):
            here = (since[distance:] > distance) & is_word[:-distance]
            row, column = text[:-distance][here], text[distance:][here]
            if symmetric:
                row, column = np.minimum(row, column), np.maximum(row, column)
            key = row.astype(np.int64)
            key <<= self.bits
            key |= column
            if self.distance_bits:
                key <<= self.distance_bits
                key |= distance
            yield key

    def add(self, keys: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(distinct pairs, sorted; what each counts for), int64 where it is whole."""
        every = np.concatenate([*keys, np.zeros(0, np.int64)])
        every.sort()
        begins = np.flatnonzero(np.append(True, every[1:] != every[:-1])[: len(every)])
        found, counts = every[begins], np.diff(np.append(begins, len(every)))
        if not self.distance_bits:
            return found, counts
        distances = found & ((1 << self.distance_bits) - 1)
        found >>= self.distance_bits
        values = counts * WEIGHTINGS[self.weighting](distances, self.width)
        begins = np.flatnonzero(np.append(True, found[1:] != found[:-1])[: len(found)])
        return found[begins], np.add.reduceat(values, begins) if len(begins) else values

    def split(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Splits keys of pairs into (rows, columns)."""
        return pairs >> self.bits, pairs & ((1 << self.bits) - 1)


def cooccurrences(
    text: np.ndarray, size: int, window: int, weighting: str = "flat", symmetric: bool = True
) -> scipy.sparse.csr_matrix:
    """How often words stand within `window` words of each other in one sentence.

    Unknown words and the ends of sentences count as nothing, but unknown words keep their places: words to either side
    of one are two apart. (word2vec and GloVe drop rare words first, which widens their windows.)

    Args:
      text: numbered sentences (`sentences.read`), `[T]`.
      size: V.
      window: words to either side; wider than a sentence is as wide as it.
      weighting: see `Window`.
      symmetric: words to both sides are columns; else those to the right only, whose transpose counts those to the
        left: `scipy.sparse.hstack([c.T, c])` keeps the sides apart.

    Returns:
      `[V, V]`, int64 if flat and else float64, columns sorted. Takes about 24 bytes a pair of the text meanwhile.

    Raises:
      CountsError: for windows below 1, unknown weightings, a text of no sentence, words beyond the vocabulary, and
        vocabularies that 64-bit pairs do not hold.
    """
    how = Window(size, window, weighting)
    pairs, values = how.add(list(how.keys(text, symmetric)))
    rows, columns = how.split(pairs)
    begins = np.append(0, np.cumsum(np.bincount(rows, minlength=size)))
    counts = scipy.sparse.csr_matrix((values, columns.astype(np.int32), begins), (size, size))
    return counts + counts.T if symmetric else counts


def one_hot(ids: Sequence[int] | np.ndarray, size: int) -> scipy.sparse.csr_matrix:
    """Rows with a one at a word's number, `[N, size]` float64.

    Raises:
      CountsError: for numbers outside `0, ..., size - 1`.
    """
    ids = np.asarray(ids, np.int64).reshape(-1)
    if len(ids) and not (ids.min() >= 0 and ids.max() < size):
        raise CountsError(f"ids {ids.min()} to {ids.max()} are not all below size={size}")
    return scipy.sparse.csr_matrix((np.ones(len(ids)), ids, np.arange(len(ids) + 1)), (len(ids), size))


def ppmi(
    counts: scipy.sparse.csr_matrix, shift: float = 1.0, smoothing: float = 1.0, positive: bool = True
) -> scipy.sparse.csr_matrix:
    """Pointwise mutual information, `log p(w, c) - log p(w) - log p(c) - log shift`, of pairs that were seen.

    Args:
      counts: not negative, `[V, C]`.
      shift: k, as if there were k negative samples.
      smoothing: alpha; p(c) is proportional to the context's count to the power of it. 0.75 helps (Levy et al.).
      positive: negative values become 0, which a pair that was not seen has too (its PMI would be minus infinity).

    Returns:
      `[V, C]` float64, natural logarithms.

    Raises:
      CountsError: for counts without a pair, negative or not finite ones, a shift or smoothing that is not positive.
    """
    if not (shift > 0 and np.isfinite(shift)) or not (smoothing > 0 and np.isfinite(smoothing)):
        raise CountsError(f"shift={shift} and smoothing={smoothing} must be positive numbers")
    out = scipy.sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    out.eliminate_zeros()
    if not out.nnz:
        raise CountsError("the counts hold no pair: no sentence has two known words within the window")
    if not (np.isfinite(out.data).all() and out.data.min() > 0):
        raise CountsError(
            f"counts must be finite and not negative, but reach from {out.data.min()} to {out.data.max()}"
        )
    context = np.asarray(out.sum(axis=0)).ravel() ** smoothing
    with np.errstate(divide="ignore"):  # of words that were not seen
        word, context = np.log(np.asarray(out.sum(axis=1)).ravel()), np.log(context / context.sum())
    out.data = np.log(out.data) - np.repeat(word, np.diff(out.indptr)) - context[out.indices] - np.log(shift)
    if positive:
        np.maximum(out.data, 0.0, out=out.data)
        out.eliminate_zeros()
    return out


def svd_vectors(matrix: scipy.sparse.csr_matrix, dim: int, exponent: float = 0.5, seed: int = 0) -> np.ndarray:
    """Rows of `U S^exponent` of the truncated singular value decomposition (ARPACK), `[V, dim]` float64.

    Args:
      matrix: `[V, C]`.
      dim: how many singular values, the greatest first.
      exponent: 1 is latent semantic analysis; 0.5 and 0 serve word similarity better (Levy et al. 2015).
      seed: of the vector that the search starts with; the result depends on it by rounding only, and where singular
        values are equal. In every column the entry farthest from 0 is positive.

    Raises:
      CountsError: where dim is not below both sides of the matrix.
    """
    if not 1 <= dim < min(matrix.shape):
        raise CountsError(f"dim={dim} must be at least 1 and below both sides of a matrix of {matrix.shape}")
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    u_VD, values, _ = scipy.sparse.linalg.svds(matrix.astype(np.float64), dim, v0=start)
    order = np.argsort(-values, kind="stable")
    u_VD, values = u_VD[:, order], values[order]
    u_VD *= np.where(u_VD[np.abs(u_VD).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)[None]
    return u_VD * values[None] ** exponent


def cosine(a: np.ndarray | scipy.sparse.csr_matrix, b: np.ndarray | scipy.sparse.csr_matrix) -> np.ndarray:
    """Cosines of rows of `a` `[N, D]` with rows of `b` `[M, D]`, dense `[N, M]`; rows of zeros have 0.

    Raises:
      CountsError: for rows of other lengths.
    """
    if a.shape[1:] != b.shape[1:] or len(a.shape) != 2:
        raise CountsError(f"rows of shapes {a.shape} and {b.shape} cannot be compared: give [N, D] and [M, D]")
    product = _unit(a) @ _unit(b).T
    return product.toarray() if scipy.sparse.issparse(product) else product


def _unit(x: np.ndarray | scipy.sparse.csr_matrix) -> np.ndarray | scipy.sparse.csr_matrix:
    norms = scipy.sparse.linalg.norm(x, axis=1) if scipy.sparse.issparse(x) else np.linalg.norm(x, axis=1)
    return scipy.sparse.diags_array(1.0 / np.where(norms > 0, norms, 1.0)) @ x
