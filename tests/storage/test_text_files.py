"""Bytes become text by one rule: marks decide, UTF-8 otherwise or what is asked for, and lines end at line feeds."""

import gzip
import io

import pytest
import zstandard

from llm_jax.storage import text_files
from llm_jax.storage.text_files import TextFile, TextFileError

LINES = ["é\u2028one", "", "two\x85\x0c\x1e", "\u3000 three\r"]  # line ends of str.splitlines, which end no line here
TEXT = "".join(f"{line}\n" for line in LINES)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "cp1252"])
def test_every_encoding_gives_the_same_lines(coding, size, tmp_path):
    text = TEXT if coding != "cp1252" else "café\n\n x"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(coding))
    named = coding if coding in ("utf-16-be", "cp1252") else None  # the others have a mark
    want = list(enumerate(text.removesuffix("\n").split("\n"), 1))
    file = TextFile(path, named, block_bytes=size)
    assert list(file.lines()) == [(n, line.removesuffix("\r")) for n, line in want]
    assert file.read() == text
    stream = TextFile("stdin", named, io.BytesIO(text.encode(coding)), size)
    assert list(stream.byte_lines()) == [(n, line.removesuffix("\r").encode()) for n, line in want]


def test_a_mark_wins_over_the_encoding_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("utf-8-sig"))
    assert TextFile(tmp_path / "a.txt", "latin-1").read() == "é"


REFUSED = {
    "latin-1": (
        "ab\ncafé\n".encode("latin-1"),
        None,
        r"a.txt:2 is not UTF-8 \(.* at byte 3\): convert it to UTF-8, or name",
    ),
    "UTF-16 without a mark": ("ab\n".encode("utf-16-le"), None, r"a.txt:1 is not UTF-8 \(a zero byte at byte 1\)"),
    "half a pair": (b"\xff\xfea\0\0\xd8a\0", None, r"a.txt is not utf-16-le \(illegal UTF-16 surrogate at byte 4\)"),
    "half a character": (b"\xff\xfea\0b", None, r"a.txt is not utf-16-le \(truncated data at byte 4\)"),
    "another encoding": (b"ab\x81", "cp1252", r"a.txt is not cp1252 \(character maps to <undefined> at byte 2\)"),
    "no encoding": (b"ab", "latin-one", "encoding='latin-one' is not an encoding that Python knows"),
    "no text encoding": (b"ab", "base64", "encoding='base64' is not an encoding that Python knows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_in_its_encoding_is_refused_with_its_place(name, tmp_path):
    data, coding, message = REFUSED[name]
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(TextFileError, match=message) as error:
        list(TextFile(tmp_path / "a.txt", coding).lines())
    assert "\n" not in str(error.value)


def test_replacing_says_so_by_its_name(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea\0\0\xd8a\0")
    assert TextFile(tmp_path / "b.txt", "replace").read() == "a\ufffda"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n\0")
    assert list(TextFile(tmp_path / "a.txt", "replace").lines()) == [(1, "caf\ufffd"), (2, "\0")]


def test_compressed_files_are_read_a_block_at_a_time(tmp_path):
    text = b"".join(b"%d\n" % i for i in range(4000))
    half = len(text) // 2
    pack = zstandard.ZstdCompressor().compress
    files = {
        "a.gz": gzip.compress(text),
        "b.gz": gzip.compress(text[:half]) + gzip.compress(text[half:]),
        "c.zst": pack(text),
        "d.zst": pack(text[:half]) + pack(b"") + pack(text[half:]),
        "e.txt": text,
        "f.gz": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        blocks = list(text_files.unpacked(tmp_path / name, 500))
        assert b"".join(blocks) == (text if data else b"")
        assert len(blocks) > 5 or not data
        if name[0] in "abcd":
            (tmp_path / name).write_bytes(data[:-3])
            with pytest.raises(TextFileError, match=f"{name} cannot be decompressed: "):
                list(text_files.unpacked(tmp_path / name, 500))


def test_a_line_of_a_pipe_comes_before_the_next_is_written():
    """A chat through a pipe needs this: the reader asks for no byte behind the line feed."""

    class Pipe(io.RawIOBase):
        given = [b"Hi\n", b"\xef\xbb", b""]

        def readable(self):
            return True

        def readinto(self, buffer):
            piece = self.given.pop(0)
            buffer[: len(piece)] = piece
            return len(piece)

    pipe = Pipe()
    lines = TextFile("stdin", "replace", io.BufferedReader(pipe)).lines()
    assert next(lines) == (1, "Hi") and len(pipe.given) == 2
