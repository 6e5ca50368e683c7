"""ARPA files: back-off models as text, as SRILM and KenLM read and write them.

A header names how many n-grams there are of every order; then come sections, of a line an n-gram: the log10 of its
probability, its words, and the log10 of its back-off, which is 0 where it is missing.
"""

import gzip
import io
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from etils import epath
from tqdm import tqdm

from llm_jax.classic.ngrams import counting
from llm_jax.classic.ngrams.counting import ABSENT
from llm_jax.classic.ngrams.ngram import BackoffModel, Model
from llm_jax.classic.text.sentences import SPECIAL, Vocabulary
from llm_jax.storage.text_files import TextFile, TextFileError

NEVER = -99.0  # how the format writes the logarithm of zero; what is below is as little
CHUNK = 1 << 16  # n-grams at once
UNSEEN_UNKNOWN = -100.0  # of `<unk>` where a file has none


class ArpaError(ValueError):
    """A file that is not an ARPA file; one line with its name and where."""


def write(model: Model, path: epath.PathLike, progress: bool = False, chunk: int = CHUNK) -> None:
    """Writes a model; `.gz` is compressed; what is not finished goes.

    Args:
      model: a table of back-offs.
      path: of the file.
      progress: shows a bar.
      chunk: n-grams that are written at once.

    Raises:
      ArpaError: for a model that is not a table of back-offs.
    """
    if not isinstance(model, BackoffModel):
        raise ArpaError("ARPA files hold back-off tables, and smoothing=add_k makes none: store its counts in a folder")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as raw, _packed(raw, path, "wb") as packed, io.TextIOWrapper(packed, "utf-8") as file:
            _write(model, file, _bar(sum(map(len, model.keys)), progress, "writing"), chunk)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(model: BackoffModel, file: TextIO, bar: Any, chunk: int) -> None:
    file.write("\\data\\\n" + "".join(f"ngram {n}={len(k)}\n" for n, k in enumerate(model.keys, start=1)))
    spelled = np.array(model.vocabulary.words, object)
    for n, words in enumerate(counting.words_of(model.keys, len(model.vocabulary)), start=1):
        file.write(f"\n\\{n}-grams:\n")
        for i in range(0, len(words), chunk):
            here = slice(i, i + chunk)
            log_probs = np.maximum(model.log_probs[n - 1][here], NEVER).tolist()
            rows = map(" ".join, spelled[words[here]].tolist())
            if n == model.order:
                file.writelines(f"{p:.7g}\t{row}\n" for p, row in zip(log_probs, rows, strict=True))
            else:
                pays = np.maximum(model.backoffs[n - 1][here], NEVER).tolist()
                file.writelines(f"{p:.7g}\t{row}\t{b:.7g}\n" for p, row, b in zip(log_probs, rows, pays, strict=True))
            bar.update(len(log_probs))
    file.write("\n\\end\\\n")
    bar.close()


def _bar(total: int, progress: bool, what: str) -> Any:
    return tqdm(total=total, unit="n-gram", unit_scale=True, disable=not progress, desc=what)


def _packed(raw: Any, path: epath.Path, mode: Any) -> Any:
    return gzip.GzipFile(fileobj=raw, mode=mode) if path.suffix == ".gz" else raw


def read(path: epath.PathLike, progress: bool = False) -> BackoffModel:
    """Reads a model; `.gz` is unpacked.

    Args:
      path: of the file.
      progress: shows a bar.

    Raises:
      ArpaError: where the file is missing, cut short, or does not hold what it says; with the line.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise ArpaError(f"{path} is not a file")
    return _Lines(path, progress).model()


class _Lines:
    """Reads an ARPA file line by line."""

    def __init__(self, path: epath.Path, progress: bool) -> None:
        self.path, self.number, self.progress = path, 0, progress
        self.lines = self._strip()

    def _strip(self) -> Iterator[bytes]:
        try:
            for number, line in TextFile(self.path).byte_lines():
                self.number = number
                line = line.strip()
                if line:
                    yield line
        except TextFileError as e:
            raise self.error(f"damaged or cut short: {e.__cause__ or e}") from None

    def error(self, text: str) -> ArpaError:
        return ArpaError(f"{self.path}:{self.number}: {text}")

    def next(self) -> bytes:
        line = next(self.lines, None)
        if line is None:
            raise self.error("the file ends before \\end\\: it was cut short")
        return line

    def model(self) -> BackoffModel:
        while (line := self.next()) != b"\\data\\":  # what stands before is a comment
            if line.startswith(b"\\"):
                raise self.error(f"{line.decode(errors='replace')} before \\data\\")
        sizes: list[int] = []
        while (line := self.next()).startswith(b"ngram "):
            order, _, size = line[6:].partition(b"=")
            if order.strip() != str(len(sizes) + 1).encode() or not size.strip().isdigit():
                raise self.error(f"expected 'ngram {len(sizes) + 1}=COUNT', not {line.decode(errors='replace')!r}")
            sizes.append(int(size))
        if not sizes:
            raise self.error("no 'ngram 1=COUNT' after \\data\\")
        vocabulary = Vocabulary(())
        keys: list[np.ndarray] = []
        log_probs: list[np.ndarray] = []
        backoffs: list[np.ndarray] = []
        self.bar = _bar(sum(sizes), self.progress, "reading")
        for n, count in enumerate(sizes, start=1):
            if line != f"\\{n}-grams:".encode():
                raise self.error(f"expected \\{n}-grams:, not {line.decode(errors='replace')!r}")
            begin = self.number
            words, p, b, line = self.section(n, count, n < len(sizes))
            if n == 1:
                words = ["<unk>" if w == "<UNK>" else w for w in words]  # SRILM's and KenLM's other name of it
                listed = set(words)
                if len(listed) < len(words):
                    raise ArpaError(f"{self.path}:{begin}: a word stands twice among the 1-grams")
                vocabulary = Vocabulary(w for w in words if w not in SPECIAL)
                missing = [i for i, w in enumerate(SPECIAL) if w not in listed]
                key = np.array([*(vocabulary.index[w] for w in words), *missing], np.int64)
                p = np.concatenate([p, [UNSEEN_UNKNOWN if i == 0 else -np.inf for i in missing]])
                b = np.concatenate([b, np.zeros(len(missing))])
            else:
                key = self.keys(n, words, vocabulary, keys, begin)
            order_ = np.argsort(key)
            keys.append(key[order_])
            if len(key) > 1 and (keys[-1][1:] == keys[-1][:-1]).any():
                raise ArpaError(f"{self.path}:{begin}: an n-gram stands twice among the {n}-grams")
            log_probs.append(p[order_])
            backoffs.append(b[order_])
        if line != b"\\end\\":
            raise self.error(f"expected \\end\\, not {line.decode(errors='replace')!r}")
        self.bar.close()
        return BackoffModel(vocabulary, keys, log_probs, backoffs[:-1])

    def section(self, n: int, size: int, pays: bool) -> tuple[list[str], np.ndarray, np.ndarray, bytes]:
        """(words one after the other, log probabilities, back-offs, the line behind) of one order."""
        words: list[bytes] = []
        p: list[float] = []
        b: list[float] = []
        for line in self.lines:
            if line[:1] == b"\\" and (line == b"\\end\\" or line.endswith(b"-grams:")):
                break
            parts = line.split()
            if len(p) == size or not n + 1 <= len(parts) <= n + 1 + pays:
                reason = (
                    f"more than the {size:,} {n}-grams that the header names"
                    if len(p) == size
                    else (f"expected a number, {n} words" + (" and perhaps a number" if pays else ""))
                )
                raise self.error(f"{reason}: {line.decode(errors='replace')[:60]!r}")
            try:
                p.append(float(parts[0]))
                b.append(float(parts[n + 1]) if len(parts) == n + 2 else 0.0)
            except ValueError:
                raise self.error(f"no number: {line.decode(errors='replace')[:60]!r}") from None
            words += parts[1 : n + 1]
            if len(p) % CHUNK == 0 or len(p) == size:
                self.bar.update((len(p) - 1) % CHUNK + 1)
        else:
            raise self.error("the file ends before \\end\\: it was cut short")
        if len(p) < size:
            raise self.error(f"{len(p):,} {n}-grams where the header names {size:,}")
        probs, pays_ = np.array(p), np.array(b)
        if not (probs <= 1e-4).all() or not (pays_ < np.inf).all():
            raise self.error(f"a log probability among the {n}-grams above 0, or no number")
        probs[probs <= NEVER], pays_[pays_ <= NEVER] = -np.inf, -np.inf
        try:
            return b"\n".join(words).decode().split("\n") if words else [], probs, pays_, line
        except UnicodeDecodeError as e:
            raise self.error(f"a word among the {n}-grams is not UTF-8 ({e.reason})") from None

    def keys(self, n: int, words: list[str], vocabulary: Vocabulary, keys: list[np.ndarray], begin: int) -> np.ndarray:
        """Keys of n-grams."""
        numbers = np.array([vocabulary.index.get(w, ABSENT) for w in words], np.int64).reshape(-1, n)
        if (numbers < 0).any():
            row = int(np.argmax((numbers < 0).any(axis=1)))
            raise ArpaError(f"{self.path}:{begin}: a word of {n}-gram {row + 1} is not among the 1-grams")
        positions = numbers[:, 0]
        for k in range(1, n - 1):
            positions = counting.find(keys[k], positions * len(vocabulary) + numbers[:, k])
        if (positions < 0).any():
            row = int(np.argmax(positions < 0))
            text = f"the first {n - 1} words of {n}-gram {row + 1} are not among the {n - 1}-grams"
            raise ArpaError(f"{self.path}:{begin}: {text}")
        return positions * len(vocabulary) + numbers[:, -1]
