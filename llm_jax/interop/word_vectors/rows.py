"""Formats of word vectors, a block of a file at a time: what the first line says, then words and numbers."""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from llm_jax.classic.vectors.word_vectors import VectorsError

FORMATS = ("word2vec", "word2vec_binary", "glove")
LONGEST = 1 << 16  # bytes of a word
NUMBER = re.compile(rb"[-+]?(\d+\.?\d*(e[-+]?\d+)?|\.\d+(e[-+]?\d+)?|nan|inf|infinity)", re.IGNORECASE)

Rows = Iterator[tuple[list[bytes], np.ndarray]]


class VectorFile:
    """A file whose first line was looked at.

    Attributes:
      format: one of FORMATS.
      size: V of the header, None without one.
      width: D.
    """

    def __init__(
        self,
        path: epath.Path,
        blocks: Iterator[bytes],
        format: str | None,
        limit: int | None,
        keep: set[bytes] | None,
    ) -> None:
        """Looks at the first line.

        Args:
          path: of the file, for errors.
          blocks: its bytes.
          format: one of FORMATS; None finds it out.
          limit: reads the first so many words only.
          keep: only these words; the numbers of others are not looked at.

        Raises:
          VectorsError: for an empty file, or a first line that does not fit the format.
        """
        self.path, self.limit, self.keep = path, limit, keep
        head = next(blocks, b"")
        if not head.strip():
            raise VectorsError(f"{path} is empty")
        first, _, rest = head.partition(b"\n")
        fields = first.split()
        headed = len(fields) == 2 and all(f.isdigit() and len(f) < 19 for f in fields)
        if format is None:
            format = "glove" if not headed else "word2vec_binary" if _is_binary(rest, int(fields[1])) else "word2vec"
        self.format = format
        self.size: int | None = None
        if format == "glove":
            self.width, rest = _width(fields), head
            if not self.width:
                raise self._error(1, f"expected a word and numbers, not {_shown(first)}")
        else:
            if not headed:
                raise self._error(1, f"expected the numbers of words and of dimensions, not {_shown(first)}")
            self.size, self.width = (int(f) for f in fields)
            if not self.size or not self.width:
                raise self._error(
                    1, f"the header names {self.size:,} words of {self.width:,} dimensions: nothing to read"
                )
        self.blocks = itertools.chain([rest], blocks)

    def _error(self, line: int, text: str) -> VectorsError:
        return VectorsError(f"{self.path}:{line}: {text}")

    def rows(self) -> Rows:
        """(words, vectors `[n, D]`), some at a time.

        Raises:
          VectorsError: where the file does not hold what it says.
        """
        return self._binary() if self.format == "word2vec_binary" else self._text()

    def _text(self) -> Rows:
        """(words, vectors) of some lines at a time; empty lines hold none."""
        rest, line, count = b"", 1 if self.size is None else 2, 0
        firsts = None if self.keep is None else {w.split(None, 1)[0] for w in self.keep if w.strip()}
        for block in itertools.chain(self.blocks, [b"\n"]):
            *lines, rest = (rest + block).split(b"\n")
            rows = [(n, x) for n, x in enumerate(lines, start=line) if x and not x.isspace()]
            line += len(lines)
            if self.limit is not None:
                rows = rows[: self.limit - count]
            if self.size is not None and count + len(rows) > self.size:
                raise self._error(
                    rows[self.size - count][0], f"more than the {self.size:,} words that the header names"
                )
            count += len(rows)
            if firsts is not None:
                rows = [(n, x) for n, x in rows if x.split(None, 1)[0] in firsts]
            if rows:
                yield self._kept(*self._parsed(rows))
            if count == self.limit:
                return
        if self.size is not None and count < self.size:
            text = f"{count:,} words where the header names {self.size:,}: it is wrong, or the file was cut short"
            raise VectorsError(f"{self.path}: {text}")

    def _kept(self, words: list[bytes], table: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        if self.keep is None or all(w in self.keep for w in words):
            return words, table
        chosen = [i for i, w in enumerate(words) if w in self.keep]
        return [words[i] for i in chosen], table[chosen]

    def _parsed(self, rows: Sequence[tuple[int, bytes]]) -> tuple[list[bytes], np.ndarray]:
        try:
            words, numbers = zip(*(line.split(None, 1) for _, line in rows), strict=True)
            table = _table(numbers)
            if table.shape[1] == self.width:
                return list(words), table
        except ValueError:
            pass  # a word with blanks, or something wrong: line by line
        pairs = [self._parsed_row(n, line) for n, line in rows]
        return [w for w, _ in pairs], _table([x for _, x in pairs])

    def _parsed_row(self, n: int, line: bytes) -> tuple[bytes, bytes]:
        """(word, numbers) of one line."""
        fields, width = line.split(), self.width
        if _width(fields) != width:
            wrong = [f for f in fields[-width:] if not NUMBER.fullmatch(f)]
            if len(fields) > width and wrong:
                raise self._error(n, f"no number: {_shown(wrong[0])}")
            source = "first line has" if self.size is None else "header names"
            raise self._error(n, f"{len(fields) - 1:,} numbers where the {source} {width:,}: {_shown(line)}")
        word, *_ = line.strip().rsplit(None, width)
        return word, b" ".join(fields[-width:])

    def _binary(self) -> Rows:
        """(words, vectors) of some bytes at a time."""
        size = self.size or 0
        wanted, nbytes = min(size, self.limit or size), 4 * self.width
        rest, count = b"", 0
        for block in self.blocks:
            rest += block
            words, vectors, at = [], [], 0
            while count < wanted:
                blank = rest.find(b" ", at, at + LONGEST)
                word = rest[at:blank].replace(b"\n", b"")
                if (blank < 0 and len(rest) - at >= LONGEST) or (blank >= 0 and not word):
                    text = f"no word {count + 1:,}: damaged, or the first line names another width than the file has"
                    raise VectorsError(f"{self.path}: {text}")
                if blank < 0 or len(rest) <= blank + nbytes:
                    break
                at = blank + 1 + nbytes
                count += 1
                if self.keep is None or word in self.keep:
                    words.append(word)
                    vectors.append(rest[at - nbytes : at])
            if words:
                yield words, np.frombuffer(b"".join(vectors), "<f4").reshape(-1, self.width).astype(np.float32)
            rest = rest[at:]
            if count == wanted:
                break
        if count < wanted:
            text = f"cut short behind word {count:,} of the {size:,} that the first line names"
            raise VectorsError(f"{self.path}: {text}")
        if wanted == size and (rest.strip(b"\n") or any(block.strip(b"\n") for block in self.blocks)):
            raise VectorsError(f"{self.path}: more than the {size:,} words that the first line names")


def _shown(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


def _table(numbers: Sequence[bytes]) -> np.ndarray:
    return np.loadtxt(numbers, np.float32, comments=None, ndmin=2)  # type: ignore[arg-type]  # bytes will do


def _width(fields: Sequence[bytes]) -> int:
    """Numbers at a line's end, behind a word of one field at least."""
    behind = itertools.takewhile(NUMBER.fullmatch, reversed(fields[1:]))
    return sum(1 for _ in behind)


def _is_binary(rest: bytes, width: int) -> bool:
    """Whether a first vector is not text: other bytes, or too few for its numbers."""
    found = re.match(rb"[^ \t]*[ \t]([^\n]*)", rest)
    row = found[1] if found else b""
    is_long = len(row) >= 2 * width - 1 and re.fullmatch(rb"[\t\r -~]*", row)
    return not (is_long or re.fullmatch(rb"[-+.\deEnaif\s]+", row))
