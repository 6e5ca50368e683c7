"""Counts of n-grams beyond memory: blocks of text are sorted one by one, and what was sorted is merged.

A block holds whole lines. For every order, each block's keys (`counting`) become a sorted run in a file; runs are
merged range by range of keys into one table; and each block is looked up in it, which gives the histories of the next
order. What stays in memory are the vocabulary, a block for every process, and a range. Files take 12 bytes a word of
text and 24 an n-gram, and 16 a word while an order is sorted.

What was finished before an interruption is taken again: the numbered text (`written.json`), orders (`places_N`), and
sorted runs of the order that was next. A folder must be of one text and one vocabulary, which the caller sees to.
"""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from llm_jax.classic.ngrams import counting
from llm_jax.classic.ngrams.counting import ABSENT, Counts
from llm_jax.classic.text import sentences
from llm_jax.classic.text.numbering import Numbers
from llm_jax.classic.text.sentences import BEGIN, END, Reader, Vocabulary
from llm_jax.storage import digests, locks

WRITTEN = "written.json"  # stands where the text is whole


class Merge(NamedTuple):
    """How sorted runs are merged.

    Attributes:
      keys: about so many are merged at once.
      every: of so many sorted keys one is a candidate for the end of a range.
    """

    keys: int = 1 << 22
    every: int = 1 << 10


@contextlib.contextmanager
def resumable(scratch: epath.PathLike, reader: Reader, **options: Any) -> Iterator[epath.Path]:
    """A folder of its own in `scratch` for a corpus and options; goes at the end, and stays where one interrupts.

    Args:
      scratch: where several may lie; a warning names those of others.
      reader: of files whose names, sizes and times tell one corpus from another.
      **options: of `write_text`.

    Raises:
      ValueError: where another process works there.
      KeyboardInterrupt: as it came, with how to go on.
    """
    files = [(str(p), *digests.stamp(p)[:3]) for p in reader.paths]
    given = options.get("vocabulary")
    about = (files, reader.policy, sorted((options | {"vocabulary": given and given.words}).items()))
    folder = epath.Path(scratch) / f"ngrams_{zlib.crc32(repr(about).encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    for other in sorted(set(epath.Path(scratch).glob("ngrams_*")) - {folder}):
        warnings.warn(f"{other} is of another corpus or other options: delete it if nobody goes on there", stacklevel=3)
    try:
        lock = locks.hold(folder / "lock")
    except BlockingIOError:
        raise ValueError(f"another process counts in {folder}: wait for it, or take another folder") from None
    with lock:
        try:
            yield folder
        except KeyboardInterrupt as e:
            said = f"{e}" or "interrupted"
            raise KeyboardInterrupt(f"{said}; the same command goes on with what is in {folder}") from None
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def write_text(
    reader: Reader, folder: epath.PathLike, vocabulary: Vocabulary | None = None, **options: Any
) -> tuple[Vocabulary, list[int]]:
    """Numbers a text into `folder/text`, int32.

    Args:
      reader: its files.
      folder: for files that are the caller's to delete.
      vocabulary: of it; made from the text without.
      **options: of `sentences.vocabulary_of`, where no vocabulary is given.

    Returns:
      The vocabulary, and where blocks end.
    """
    sentences.check_options(vocabulary, options)
    folder = epath.Path(folder)
    written = folder / WRITTEN
    if written.exists():
        about = json.loads(written.read_text())
        reader.invalid = about["invalid"]
        return Vocabulary(about["words"]), about["ends"]
    numbers = Numbers()
    number, line_end = (vocabulary.number, END) if vocabulary else (numbers.read, 0)
    counts, lengths, words = np.zeros(0, np.int64), [], 0
    with (folder / "raw").open("wb") as f:
        for lines in reader.blocks():
            block = number(lines)
            f.write(block.tobytes())
            lengths.append(len(block))
            words += int(np.count_nonzero(block != line_end))
            if not vocabulary:
                more = np.bincount(block, minlength=len(counts))
                more[: len(counts)] += counts
                counts = more
    if not words:
        raise sentences.no_word(reader)
    new = None
    if not vocabulary:
        vocabulary, new = sentences.vocabulary_of(numbers.words, counts, **options)
    ends = [0]
    with (folder / "raw").open("rb") as source, (folder / "text").open("wb") as f:
        for length in lengths:
            block = np.frombuffer(source.read(4 * length), np.int32)
            block = sentences.with_begins(block if new is None else new[block])
            f.write(block.tobytes())
            ends.append(ends[-1] + len(block))
    (folder / "raw").unlink()
    about = {"invalid": reader.invalid, "ends": ends, "words": vocabulary.words[len(sentences.SPECIAL) :]}
    (folder / "part").write_text(json.dumps(about))
    (folder / "part").replace(written)
    return vocabulary, ends


def _map(folder: epath.Path, name: str, dtype: Any, mode: Any = "r") -> np.ndarray:
    """A file as an array; an empty one cannot be mapped."""
    path = folder / name
    return np.memmap(path, dtype, mode) if path.stat().length else np.zeros(0, dtype)


def _sort(folder: epath.Path, n: int, size: int, block: tuple[int, int, int]) -> None:
    """A sorted run of the keys of order n + 1 in a block."""
    i, begin, end = block
    run = folder / f"run_{n}_{i}"
    if run.exists():
        return
    text = np.asarray(_map(folder, "text", np.int32)[begin:end])
    positions = text.astype(np.int64) if n == 1 else np.asarray(_map(folder, f"places_{n - 1}", np.int64)[begin:end])
    keys = counting.extend(positions, text, size)
    found, often = np.unique(keys[keys >= 0], return_counts=True)
    part = folder / f"part_{i}"
    np.concatenate([found, often]).astype(np.int64).tofile(part)
    part.replace(run)


def _place(folder: epath.Path, n: int, size: int, block: tuple[int, int, int]) -> None:
    """The positions of a block's n-grams of order n + 1, and of their suffixes."""
    _, begin, end = block
    text = np.asarray(_map(folder, "text", np.int32)[begin:end])
    shorter = text.astype(np.int64) if n == 1 else np.asarray(_map(folder, f"places_{n - 1}", np.int64)[begin:end])
    keys = counting.extend(shorter, text, size)
    inside = keys >= 0
    positions = np.full(len(text), ABSENT, np.int64)
    positions[inside] = counting.find(_map(folder, f"keys_{n}", np.int64), keys[inside])
    _map(folder, "placing", np.int64, "r+")[begin:end] = positions
    if inside.any():
        _map(folder, f"suffixes_{n}", np.int64, "r+")[positions[inside]] = shorter[inside]


def merge(
    runs: Sequence[tuple[np.ndarray, np.ndarray]],
    write: Callable[[np.ndarray, np.ndarray], None],
    ranges: Merge = Merge(),
) -> None:
    """Merges sorted runs of (keys, counts), equal keys into one, and writes them range by range."""
    candidates = np.sort(np.concatenate([keys[:: ranges.every] for keys, _ in runs]))
    step = max(ranges.keys // ranges.every, 1)
    bounds = [*np.unique(candidates[step::step]), np.iinfo(np.int64).max]
    begins = [0] * len(runs)
    for bound in bounds:
        ends = [int(np.searchsorted(keys, bound)) for keys, _ in runs]
        pieces = [(k[a:b], c[a:b]) for (k, c), a, b in zip(runs, begins, ends, strict=True)]
        keys, counts = (np.concatenate(x) for x in zip(*pieces, strict=True))
        if len(keys):
            order = np.argsort(keys)
            keys, counts = keys[order], counts[order]
            first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
            write(keys[first], np.add.reduceat(counts, first))
        begins = ends


def count(
    folder: epath.PathLike,
    size: int,
    order: int,
    ends: Sequence[int],
    workers: int = 1,
    progress: bool = False,
    ranges: Merge = Merge(),
) -> Counts:
    """Counts of all orders up to `order` of what `write_text` wrote, as mapped files; equal to `counting.count`.

    Args:
      folder: with the text; the tables come beside it.
      size: V.
      order: of the longest n-grams.
      ends: of blocks.
      workers: processes.
      progress: shows a bar.
      ranges: see `Merge`.

    Raises:
      ValueError: for orders below 1.
    """
    if order < 1:
        raise ValueError(f"order={order} must be at least 1")
    folder = epath.Path(folder)
    blocks = [(i, a, b) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    single = np.zeros(size, np.int64)
    for _, begin, end in blocks:
        single += np.bincount(_map(folder, "text", np.int32)[begin:end], minlength=size)
    single[BEGIN] = 0
    out = Counts(size, [np.arange(size)], [single], [np.zeros(size, np.int64)])
    done = max((n for n in range(1, order) if (folder / f"places_{n}").exists()), default=0)
    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=2 * len(blocks) * (order - 1), unit="block", disable=not progress, desc="counting")
    bar.update(2 * len(blocks) * done)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context) if workers > 1 else None
    with bar, pool or _Same() as run:
        for n in range(1, order):
            counting.check_keys(out.keys[-1], n, size)
            for step in (_sort, _place) if n > done else ():
                if step is _place:
                    _merge_runs(folder, n, len(blocks), ends[-1], ranges)
                work: Iterable[None] = run.map(functools.partial(step, folder, n, size), blocks)
                for _ in work:
                    bar.update()
            if n > done:
                _finish(folder, n, len(blocks))
            for name in ("keys", "counts", "suffixes"):
                getattr(out, name).append(_map(folder, f"{name}_{n}", np.int64))
    return out


class _Same:
    """An executor that runs every task in this process, immediately."""

    map = staticmethod(map)

    def __enter__(self) -> "_Same":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _finish(folder: epath.Path, n: int, count: int) -> None:
    """Says that order n + 1 is done, and deletes what no longer matters."""
    (folder / "placing").replace(folder / f"places_{n}")
    (folder / f"places_{n - 1}").unlink(missing_ok=True)
    for i in range(count):
        (folder / f"run_{n}_{i}").unlink()


def _merge_runs(folder: epath.Path, n: int, count: int, words: int, ranges: Merge) -> None:
    """Runs to `keys_n` and `counts_n`, and room for `suffixes_n` and positions."""
    runs = []
    for i in range(count):
        run = _map(folder, f"run_{n}_{i}", np.int64)
        runs.append((run[: len(run) // 2], run[len(run) // 2 :]))
    with (folder / f"keys_{n}").open("wb") as k, (folder / f"counts_{n}").open("wb") as c:

        def write(keys: np.ndarray, counts: np.ndarray) -> None:
            k.write(keys.tobytes())
            c.write(counts.tobytes())

        merge(runs, write, ranges)
        size = k.tell()
    with (folder / f"suffixes_{n}").open("wb") as s, (folder / "placing").open("wb") as p:
        s.truncate(size)
        p.truncate(8 * words)
