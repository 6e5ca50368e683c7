"""Text as numbers for n-grams and word vectors: one sentence a line, words between blanks, `.gz` too.

Words stay bytes until a vocabulary is made: text is UTF-8, which splitting at ASCII blanks does not harm. Files come
through `storage.text_files`, which drops a byte order mark and turns UTF-16 that has one into UTF-8.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from llm_jax.classic.text.numbering import LINE_END, Numbers
from llm_jax.storage.text_files import TextFile, TextFileError

UNKNOWN, BEGIN, END = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")
POLICIES = ("strict", "skip", "replace")
BLOCK = 1 << 23  # bytes read at once


class TextError(ValueError):
    """A text that cannot be read as sentences; one line that says why and where."""


class Reader:
    """Sentences of files, a block of lines at a time.

    Attributes:
      invalid: lines so far that were no UTF-8.
    """

    def __init__(self, paths: Sequence[epath.PathLike], policy: str = "strict", block: int = BLOCK) -> None:
        """Checks the files.

        Args:
          paths: of text files.
          policy: what becomes of lines that are not UTF-8: `strict` is an error, `skip` drops them, `replace` puts
            U+FFFD instead of what is wrong.
          block: bytes read at once.

        Raises:
          TextError: for a missing file, no file at all, or an unknown policy.
        """
        self.paths, self.policy, self.invalid = [epath.Path(p) for p in paths], policy, 0
        self._block = block
        if policy not in POLICIES:
            raise TextError(f"invalid={policy!r} is not one of {', '.join(POLICIES)}")
        if not self.paths:
            raise TextError("no file: the pattern of the corpus matches nothing")
        if missing := [p for p in self.paths if not p.is_file()]:
            raise TextError(f"{missing[0]} is not a file")

    def blocks(self) -> Iterator[bytes]:
        """Whole lines of valid UTF-8, each ended by a line feed."""
        for path in self.paths:
            line = 1
            try:
                for block in _lines(TextFile(path).blocks(self._block)):
                    yield self._valid(block, path, line)
                    line += block.count(b"\n")
            except TextFileError as e:
                reason = e.__cause__ or e
                raise TextError(f"{path}: damaged or cut short behind line {line - 1}: {reason}") from None

    def _valid(self, block: bytes, path: epath.Path, line: int) -> bytes:
        try:
            block.decode()
        except UnicodeDecodeError:
            lines = (x + b"\n" for x in block.split(b"\n")[:-1])
            return b"".join(self._valid_line(x, path, line + i) for i, x in enumerate(lines))
        return block

    def _valid_line(self, text: bytes, path: epath.Path, line: int) -> bytes:
        try:
            text.decode()
        except UnicodeDecodeError as e:
            if self.policy == "strict":
                raise TextError(
                    f"{path}:{line} is not UTF-8 ({e.reason} at byte {e.start}): convert it, or take invalid=skip or "
                    "invalid=replace"
                ) from None
            self.invalid += 1
            return b"" if self.policy == "skip" else text.decode(errors="replace").encode()
        return text


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks that end with a line."""
    rest = b""
    for block in blocks:
        rest += block
        cut = rest.rfind(b"\n") + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest + b"\n"


class Vocabulary:
    """Words and their numbers: 0 unknown, 1 and 2 the ends of a sentence, then the others.

    Attributes:
      words: by number.
      index: numbers by word.
    """

    def __init__(self, words: Iterable[str]) -> None:
        """Numbers the words in order, after the special ones."""
        self.words = [*SPECIAL, *words]
        self.index = {w: i for i, w in enumerate(self.words)}
        if len(self.index) != len(self.words):
            twice = next(w for w, n in collections.Counter(self.words).items() if n > 1)
            raise TextError(f"the vocabulary names {twice!r} twice")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """A sentence's numbers, `[T + 2]`, with both ends; a special word is unknown, as in texts."""
        numbers = (UNKNOWN if w in SPECIAL else self.index.get(w, UNKNOWN) for w in words)
        return np.array([BEGIN, *numbers, END], np.int64)

    def encode_lines(self, lines: Sequence[str]) -> np.ndarray:
        """Numbers of sentences whose words stand between ASCII blanks, int32 `[T]`, one after the other with both ends.

        Raises:
          ValueError: for a line that holds a line feed.
        """
        text = "\n".join([*lines, ""])
        if text.count("\n") != len(lines):
            raise ValueError("a line holds a line feed: give every sentence as a line of its own")
        return with_begins(self.number(text.encode(errors="surrogatepass")), keep_empty=True)

    def number(self, lines: bytes) -> np.ndarray:
        """Numbers of words between blanks, int32 `[T]`, with END for each of the line feeds, of which one ends it."""
        numbers, words = self._of_bytes
        return words.take(numbers.read(lines), mode="wrap")

    @functools.cached_property
    def _of_bytes(self) -> tuple[Numbers, np.ndarray]:
        """(what numbers bytes, the vocabulary's number of each of its numbers)."""
        spelled = [w.encode(errors="surrogatepass") for w in self.words]
        single = [i for i, w in enumerate(spelled) if i >= len(SPECIAL) and w.replace(LINE_END, b" ").split() == [w]]
        numbers = Numbers()
        numbers.read(b"".join(spelled[i] + b"\n" for i in single))
        numbers.grows = False
        return numbers, np.array([END, *single, UNKNOWN], np.int32)  # the last is that of NO_WORD


def read_vocabulary(path: epath.PathLike) -> Vocabulary:
    """Words of a file, one a line; empty lines and special words do not count.

    Raises:
      TextError: for a missing file, one that is not UTF-8, a line of several words, a word named twice, or no word.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise TextError(f"{path} is not a file")
    words = []
    for number, line in TextFile(path).byte_lines():
        parts = line.split()
        try:
            named = [x.decode() for x in parts]
        except UnicodeDecodeError as e:
            raise TextError(f"{path}:{number} is not UTF-8 ({e.reason} at byte {e.start})") from None
        if len(named) > 1:
            said = " ".join(named)[:60]
            raise TextError(f"{path}:{number}: expected a word a line, without counts or blanks, not {said!r}")
        words += [w for w in named if w not in SPECIAL]
    if not words:
        raise TextError(f"{path} names no word")
    return Vocabulary(words)


def vocabulary_of(
    words: Sequence[bytes], counts: np.ndarray, min_count: int = 1, max_size: int | None = None
) -> tuple[Vocabulary, np.ndarray]:
    """(words, most frequent first; their number for every number of `Numbers`).

    Args:
      words: of a text, see `Numbers`.
      counts: of them.
      min_count: rarer words are unknown.
      max_size: how many words are known at most, the most frequent ones (special ones beside them).

    A special word that the text spells out is unknown.

    Raises:
      TextError: where no word is frequent enough.
    """
    spelled = [w.decode() for w in words]
    new = np.full(len(words), UNKNOWN, np.int32)
    new[0] = END
    counts = counts.copy()
    counts[[i for i, w in enumerate(spelled) if i == 0 or w in SPECIAL]] = 0
    frequent = np.argsort(-counts, kind="stable")[: max_size if max_size is not None else len(counts)]
    frequent = frequent[counts[frequent] >= max(min_count, 1)]
    if not len(frequent):
        less = ": take a smaller min_count" if min_count > 1 else "; special words are none"
        raise TextError(f"no word occurs min_count={min_count} times{less}")
    new[frequent] = np.arange(len(frequent)) + len(SPECIAL)
    return Vocabulary(spelled[i] for i in frequent), new


def check_options(vocabulary: Vocabulary | None, options: dict[str, Any]) -> None:
    """Those of `vocabulary_of` mean nothing where the vocabulary is given."""
    if vocabulary and options:
        raise TypeError(f"{', '.join(options)}: only where no vocabulary is given")


def no_word(reader: Reader) -> TextError:
    """The error of a text without a word."""
    return TextError(f"{', '.join(str(p) for p in reader.paths[:3])}: no word in the corpus")


def read(
    reader: Reader, vocabulary: Vocabulary | None = None, keep_empty: bool = False, **options: Any
) -> tuple[Vocabulary, np.ndarray]:
    """Numbers a text.

    Args:
      reader: its files.
      vocabulary: of it; made from the text without.
      keep_empty: empty lines are sentences of no words, and of a given vocabulary a text may have no other.
      **options: of `vocabulary_of`, where no vocabulary is given.

    Returns:
      The vocabulary, and the sentences one after the other, int32 `[T]`, each with both ends.

    Raises:
      TextError: see `vocabulary_of`; for a text without a word.
    """
    check_options(vocabulary, options)
    numbers = Numbers()
    number, line_end = (vocabulary.number, END) if vocabulary else (numbers.read, 0)
    text = np.concatenate([np.zeros(0, np.int32), *map(number, reader.blocks())])
    if not (vocabulary and keep_empty) and not (text != line_end).any():
        raise no_word(reader)
    if vocabulary:
        return vocabulary, with_begins(text, keep_empty)
    vocabulary, new = vocabulary_of(numbers.words, np.bincount(text, minlength=len(numbers.words)), **options)
    return vocabulary, with_begins(new[text], keep_empty)


def with_begins(text: np.ndarray, keep_empty: bool = False) -> np.ndarray:
    """BEGIN put before sentences that end with END; those of no words go, unless they are kept."""
    ends = text == END
    if not keep_empty:
        text = text[~(ends & np.append(True, ends[:-1]))]
        ends = text == END
    out = np.empty(len(text) + int(ends.sum()), text.dtype)
    starts = np.append(0, np.flatnonzero(ends)[:-1] + 1)[: ends.sum()] + np.arange(ends.sum())
    inside = np.ones(len(out), bool)
    inside[starts] = False
    out[starts] = BEGIN
    out[inside] = text
    return out
