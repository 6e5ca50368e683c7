"""Text in files: how every reader turns bytes into text.

A file is unpacked (`.gz`, `.zst`), loses its byte order mark, and is decoded by one rule. The mark decides where there
is one (UTF-8, UTF-16, UTF-32), as in section 6 of the WHATWG's Encoding Standard, https://encoding.spec.whatwg.org.
Without a mark the text is UTF-8, unless `encoding` says otherwise. A line ends at a line feed, or at a carriage return
and a line feed; the other line ends that `str.splitlines` knows are part of the text.
"""

import codecs
import gzip
import itertools
import uuid
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from typing import BinaryIO

from etils import epath

BLOCK = 1 << 20  # bytes read at once, by default
REPLACE = "replace"
MARKS = (  # UTF-32's first: UTF-16's is the beginning of one
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a compressed file may raise


class TextFileError(ValueError):
    """A file that holds no text, or text in another encoding than it is read in."""


def check_encoding(encoding: str | None) -> None:
    """Checks a name before any file is read.

    Args:
      encoding: None for UTF-8; the name of a codec of Python for files without a mark; or `replace`, which is UTF-8
        with U+FFFD where the bytes are none.

    Raises:
      TextFileError: if it is not one of these.
    """
    if encoding in (None, REPLACE):
        return
    try:
        "".encode(encoding)
    except LookupError:
        raise TextFileError(
            f"encoding={encoding!r} is not an encoding that Python knows (utf-8, latin-1, cp1252, utf-16-le, ...), "
            f"nor {REPLACE!r}"
        ) from None


def unpacked(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """The bytes of a file, a block of about `size` at a time; `.gz` and `.zst` are unpacked.

    Raises:
      TextFileError: if a compressed file is damaged or cut short.
    """
    path = epath.Path(path)
    with path.open("rb") as raw:
        try:
            if path.name.endswith(".zst"):
                yield from _unzstd(raw, size)
            else:
                file = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
                yield from iter(lambda: file.read(size), b"")
        except DAMAGED as e:
            raise TextFileError(f"{path} cannot be decompressed: {e}") from e


def _unzstd(raw: BinaryIO, size: int) -> Iterator[bytes]:
    """All frames of a file; the library's reader stops after the first and takes a cut frame for the end."""
    try:
        import zstandard
    except ImportError as e:
        raise TextFileError("zstd needs zstandard: pip install 'llm_jax[parquet]'") from e
    frame = None
    while data := raw.read(size):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as e:
                raise EOFError(str(e)) from e
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it is cut short")


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a file under another name first: a kill leaves the file as it was, or whole."""
    path = epath.Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    part.write_text(text)
    part.replace(path)


class TextFile:
    """One text: a file, or a stream that is open already.

    Attributes:
      name: path of the file or name of the stream, for errors.
      encoding: see `check_encoding`.
      block_bytes: bytes read at once.
    """

    def __init__(
        self,
        path: epath.PathLike,
        encoding: str | None = None,
        stream: BufferedIOBase | None = None,
        block_bytes: int = BLOCK,
    ) -> None:
        """Opens nothing yet.

        Args:
          path: the file, or the name of the stream.
          encoding: see `check_encoding`.
          stream: is read instead of a file.
          block_bytes: bytes read at once, about.

        Raises:
          TextFileError: for an unknown encoding.
        """
        check_encoding(encoding)
        self.name, self.encoding, self.block_bytes, self._stream = str(path), encoding, block_bytes, stream

    def blocks(self, size: int | None = None) -> Iterator[bytes]:
        """The text as UTF-8 without a mark, a block of about `size` bytes (`block_bytes`) at a time.

        A file that is read as UTF-8 comes as it is, whatever its bytes are: `decode` and `lines` check them.

        Raises:
          TextFileError: if the file is damaged, or its bytes are none of another encoding.
        """
        stream, count = self._stream, size or self.block_bytes
        found = unpacked(self.name, count) if stream is None else iter(lambda: stream.read1(count), b"")
        head = b""
        for block in found:
            head += block
            if not any(len(head) < len(mark) and mark.startswith(head) for mark, _ in MARKS):
                break  # a line of a terminal or a pipe must not wait for more
        mark, marked = next(((m, e) for m, e in MARKS if head.startswith(m)), (b"", None))
        encoding = marked or ("utf-8" if self.encoding in (None, REPLACE) else self.encoding)
        rest = itertools.chain([head[len(mark) :]], found)
        if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
            yield from (block for block in rest if block)
            return
        errors = "replace" if self.encoding == REPLACE else "strict"
        decoder, taken = codecs.getincrementaldecoder(encoding)(errors), len(mark)
        for block, is_last in itertools.chain(((block, False) for block in rest), [(b"", True)]):
            taken += len(block)
            try:
                text = decoder.decode(block, is_last)
            except UnicodeDecodeError as e:  # its object is this block behind the rest of earlier ones
                raise self._refused(taken - len(e.object) + e.start, encoding, e.reason) from None
            if text:
                yield text.encode()

    def byte_lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, UTF-8 bytes) of every line, without its end."""
        number, pieces = 1, [b""]
        for block in self.blocks():
            first, *others = block.split(b"\n")
            pieces.append(first)
            for other in others:
                yield number, b"".join(pieces).removesuffix(b"\r")
                number, pieces = number + 1, [other]
        if last := b"".join(pieces):
            yield number, last.removesuffix(b"\r")

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1, text) of every line, without its end.

        Raises:
          TextFileError: see `decode`.
        """
        for number, line in self.byte_lines():
            yield number, self.decode(line, number)

    def read(self) -> str:
        """All text.

        Raises:
          TextFileError: see `decode`.
        """
        return self.decode(b"".join(self.blocks()))

    def decode(self, text: bytes, line: int | None = None) -> str:
        """Text of UTF-8 bytes, by the file's rule.

        Args:
          text: the whole file, or a line.
          line: its number.

        Raises:
          TextFileError: if they are not UTF-8 and nothing is replaced; or, where no encoding was named, if they hold a
            zero byte: text has none, but UTF-16 without a mark is full of them.
        """
        if self.encoding == REPLACE:
            return text.decode(errors="replace")
        try:
            decoded = text.decode()
        except UnicodeDecodeError as e:
            raise self._refused(e.start, "utf-8", e.reason, line) from None
        if self.encoding is None and "\0" in decoded:
            raise self._refused(text.index(b"\0"), "utf-8", "a zero byte", line)
        return decoded

    def _refused(self, at: int, encoding: str, reason: str, line: int | None = None) -> TextFileError:
        where = self.name if line is None else f"{self.name}:{line}"
        said = "UTF-8" if encoding == "utf-8" else encoding
        remedy = "convert it to UTF-8, or name its encoding where there is that choice (data.encoding, --encoding)"
        some = f"latin-1, cp1252, utf-16-le, ...; {REPLACE!r} turns bad bytes into U+FFFD"
        return TextFileError(f"{where} is not {said} ({reason} at byte {at}): {remedy}: {some}")
