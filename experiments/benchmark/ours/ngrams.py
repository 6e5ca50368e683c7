"""N-gram models of order 5: estimation from a file, queries by hash tables, memory."""

import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.classic.ngrams import counting, hashed, smoothing
from llm_jax.classic.ngrams.ngram import Model
from llm_jax.classic.text import sentences

ORDER = 5


def median(run: Callable[[], Any]) -> float:
    """Seconds of a run, the median of five."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def library_lines(tiny: bool) -> list[str]:
    """Lines of the standard library's sources, words between blanks."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 5 if tiny else None]
    words = (line.split() for f in files for line in f.read_text(errors="ignore").splitlines())
    return [" ".join(w) for w in words if w]


class Lines(NamedTuple):
    """Lines that a model is estimated from, and lines that it is asked for."""

    learned: list[str]
    asked: list[str]

    @property
    def words(self) -> int:
        """Words of the lines asked for."""
        return sum(len(line.split()) for line in self.asked)

    @property
    def tokens(self) -> int:
        """Words and ends of sentences of the lines asked for."""
        return self.words + len(self.asked)


def lines_of(spec: dict[str, Any]) -> Lines:
    """Lines of `path`, or of the standard library; with `unseen` every tenth is asked for, and the others learned."""
    if spec["path"]:
        lines = [line for line in Path(spec["path"]).read_text().split("\n") if line.split()]
    else:
        lines = library_lines(spec["tiny"])
    if not spec.get("unseen"):
        return Lines(lines, lines)
    return Lines([line for i, line in enumerate(lines) if i % 10], lines[::10])


def _estimate(path: str) -> Any:
    vocabulary, text = sentences.read(sentences.Reader([path]))
    return smoothing.estimate(counting.count(text, len(vocabulary), ORDER), vocabulary)


def _from_file(lines: list[str], use: Callable[[str], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "learned.txt")
        Path(path).write_text("\n".join(lines) + "\n")
        return use(path)


def model_of(lines: Lines) -> Any:
    """The model of the lines to be learned, a `BackoffModel`."""
    return _from_file(lines.learned, _estimate)


def num_ngrams(model: Model) -> int:
    """N-grams of all orders."""
    return sum(map(len, model.keys))


def estimate(spec: dict[str, Any]) -> dict[str, Any]:
    """Words a second of reading, counting and smoothing."""
    lines = lines_of(spec)
    return {"value": lines.words / _from_file(lines.learned, lambda path: median(lambda: _estimate(path)))}


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Bytes an n-gram: `value` of sorted arrays, `hashed` of the hash tables beside them."""
    model = model_of(lines_of(spec))
    return {"value": model.nbytes / num_ngrams(model), "hashed": hashed.HashedModel(model).nbytes / num_ngrams(model)}


def query(spec: dict[str, Any]) -> dict[str, Any]:
    """Words and ends of sentences a second, from numbers, or from lines where `numbered` is false."""
    lines = lines_of(spec)
    model = model_of(lines)
    tables, numbers = hashed.HashedModel(model), model.vocabulary.encode_lines(lines.asked)
    if spec.get("numbered", True):
        seconds = median(lambda: tables.log_prob(numbers))
    else:
        seconds = median(lambda: tables.log_prob(model.vocabulary.encode_lines(lines.asked)))
    return {"value": lines.tokens / seconds}
