"""Counts of words around words beyond memory: pairs are added up block by block, and what was added is merged.

The pairs of a block (`co_occurrence.Window`) become a sorted run in a file, and runs are merged range by range into the
arrays of one sparse matrix, as n-grams are (`streaming`). What stays in memory are the vocabulary, a block of text with
`PAIRS` pairs, a range, and where rows begin. Files take 4 bytes a word of text and 16 a distinct pair of every block,
and the result 12 a distinct pair.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse
from etils import epath

from llm_jax.classic.ngrams import streaming
from llm_jax.classic.text.sentences import Reader, Vocabulary
from llm_jax.classic.vectors.co_occurrence import Window

PAIRS = 1 << 24  # pairs that are sorted at once, and those of one distance in a block of text


def cooccurrences(
    reader: Reader,
    folder: epath.PathLike,
    window: int,
    weighting: str = "flat",
    symmetric: bool = True,
    pairs_at_once: int = PAIRS,
    ranges: streaming.Merge = streaming.Merge(),
    **options: Any,
) -> tuple[Vocabulary, scipy.sparse.csr_matrix]:
    """Equals `co_occurrence.cooccurrences` of `sentences.read`: exactly if flat, else but for the order of sums.

    Args:
      reader: of the text.
      folder: for files that are the caller's to delete; the matrix is mapped there.
      window: see `co_occurrence.cooccurrences`.
      weighting: see `co_occurrence.Window`.
      symmetric: see `co_occurrence.cooccurrences`.
      pairs_at_once: that are sorted, beside those of one distance in a block of text.
      ranges: see `streaming.Merge`.
      **options: of `sentences.vocabulary_of`.

    Returns:
      The vocabulary and the counts, `[V, V]`; past 2^31 pairs scipy copies the columns to memory, as int64.

    Raises:
      CountsError: see `co_occurrence.cooccurrences`.
      TextError: see `sentences.vocabulary_of`.
    """
    Window(1, window, weighting)  # before a long reading
    folder = epath.Path(folder)
    vocabulary, ends = streaming.write_text(reader, folder, **options)
    how = Window(len(vocabulary), window, weighting)
    dtype = np.dtype(np.int64 if weighting == "flat" else np.float64)
    runs: list[tuple[epath.Path, int]] = []
    for pairs, values in _runs(folder, ends, how, symmetric, pairs_at_once):
        path = folder / f"pairs_{len(runs)}"
        with path.open("wb") as f:
            f.write(pairs.tobytes())
            f.write(values.tobytes())
        runs.append((path, len(pairs)))
    for name in ("text", streaming.WRITTEN):
        (folder / name).unlink()
    columns, values, begins = _merge(folder, runs, how, dtype, ranges)
    for path, _ in runs:
        path.unlink()
    return vocabulary, scipy.sparse.csr_matrix((values, columns, begins), (len(vocabulary), len(vocabulary)))


def _runs(
    folder: epath.Path, ends: list[int], how: Window, symmetric: bool, at_least: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sorted pairs and what they count for, runs of at least so many pairs but for the last; none is empty."""
    waiting: list[np.ndarray] = []
    for begin, end in zip(ends, ends[1:], strict=False):
        if begin == end:  # a block of empty lines
            continue
        text = np.asarray(_map(folder / "text", np.dtype(np.int32), 4 * begin, end - begin))
        for keys in how.keys(text, symmetric):
            waiting.append(keys)
            if sum(map(len, waiting)) >= at_least:
                yield from _both(how, waiting, symmetric)
                waiting = []
    if any(map(len, waiting)):
        yield from _both(how, waiting, symmetric)


def _both(how: Window, keys: list[np.ndarray], symmetric: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs added up, and if symmetric the other way round, too."""
    pairs, values = how.add(keys)
    yield pairs, values
    if symmetric:
        rows, columns = how.split(pairs)
        turned = columns << how.bits | rows
        order = np.argsort(turned)
        yield turned[order], values[order]


def _merge(
    folder: epath.Path, files: list[tuple[epath.Path, int]], how: Window, dtype: np.dtype, ranges: streaming.Merge
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, values and where rows begin, of all runs together."""
    sizes = np.zeros(how.size, np.int64)
    if not files:
        return np.zeros(0, np.int32), np.zeros(0, dtype), np.append(0, sizes)
    runs = [(_map(p, np.dtype(np.int64), 0, n), _map(p, dtype, 8 * n, n)) for p, n in files]
    with (folder / "columns").open("wb") as c, (folder / "values").open("wb") as v:

        def write(pairs: np.ndarray, values: np.ndarray) -> None:
            rows, columns = how.split(pairs)
            first, last = rows[0], rows[-1]
            sizes[first : last + 1] += np.bincount(rows - first)
            c.write(columns.astype(np.int32).tobytes())
            v.write(values.tobytes())

        streaming.merge(runs, write, ranges)
    total = int(sizes.sum())
    columns = _map(folder / "columns", np.dtype(np.int32), 0, total)
    return columns, _map(folder / "values", dtype, 0, total), np.append(0, np.cumsum(sizes))


def _map(path: epath.Path, dtype: np.dtype, offset: int, length: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (length,))
