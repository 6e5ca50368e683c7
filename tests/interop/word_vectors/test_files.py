"""Files of word vectors: every format there and back, parts of files, and what is wrong with others."""

import gzip

import numpy as np
import pytest

from llm_jax.classic.vectors.word_vectors import VectorsError
from llm_jax.interop.word_vectors import rows as formats
from llm_jax.interop.word_vectors.files import FORMATS, read, write

WORDS = ["the", "señor", "3", "東京", "a\u00a0b", "\u2028", "</s>", "nan"]
TEXT = "3 2\na 1 2\nb 3 4\nc 5 6\n"


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(len(WORDS), 5)) * 10.0 ** rng.integers(-30, 30, (len(WORDS), 5))).astype(np.float32)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(tmp_path, matrix, format, suffix):
    """Every bit, and the format is found out."""
    path = tmp_path / "new" / f"vectors{suffix}"
    write(path, WORDS, matrix, format)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(suffix)
    for given in (None, format):
        words, again = read(path, given)
        assert words == WORDS and again.dtype == np.float32
        np.testing.assert_array_equal(again, matrix)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("format", ["word2vec", "glove"])
def test_a_byte_order_mark_belongs_to_no_header_and_no_word(tmp_path, matrix, format, coding):
    write(tmp_path / "plain", WORDS, matrix, format)
    (tmp_path / "marked").write_bytes((tmp_path / "plain").read_bytes().decode().encode(coding))
    words, again = read(tmp_path / "marked")
    assert words == WORDS
    np.testing.assert_array_equal(again, matrix)


@pytest.mark.parametrize("block", [90, 100, 137])
@pytest.mark.parametrize("format", FORMATS)
def test_any_block(tmp_path, matrix, format, block):
    """Wherever a block of the file ends."""
    write(tmp_path / "vectors", WORDS, matrix, format)
    words, again = read(tmp_path / "vectors", block_bytes=block)  # the first holds a line
    assert words == WORDS
    np.testing.assert_array_equal(again, matrix)
    for limit, keep in ((2, None), (None, {"3", "nan", "none"}), (4, {"3", "nan"}), (100, {"none"})):
        chosen = [i for i, w in enumerate(WORDS[:limit]) if keep is None or w in keep]
        words, again = read(tmp_path / "vectors", limit=limit, keep=keep, block_bytes=block)
        assert words == [WORDS[i] for i in chosen] and again.shape == (len(chosen), 5)
        np.testing.assert_array_equal(again, matrix[chosen])


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_binary_with_and_without_line_feeds(tmp_path, matrix, end):
    rows = [w.encode() + b" " + x.tobytes() + end for w, x in zip(WORDS, matrix, strict=True)]
    (tmp_path / "vectors").write_bytes(b"8 5\n" + b"".join(rows))
    words, again = read(tmp_path / "vectors")
    assert words == WORDS
    np.testing.assert_array_equal(again, matrix)


def test_binary_of_zeros_and_of_few_numbers(tmp_path):
    for width in (1, 2, 5):
        for value in (0, 1, -0.5, 1e-3):
            matrix = np.full((3, width), value, np.float32)
            write(tmp_path / "vectors", ["a", "b", "c"], matrix, "word2vec_binary")
            np.testing.assert_array_equal(read(tmp_path / "vectors")[1], matrix)


@pytest.mark.parametrize(
    "text",
    [
        "2 3\na 1 -2.5 3e-1 \nb +1 .5 2.\n",  # a blank behind the last number, as the C program and fastText put it
        "2 3\r\na 1 -2.5 0.3\r\nb 1 0.5 2\r\n",
        "2 3\na\t1\t-2.5\t0.3\nb  1 0.5  2",
        "a 1 -2.5 0.3\n\nb 1 0.5 2\n\n",
    ],
)
def test_text_from_elsewhere(tmp_path, text):
    (tmp_path / "vectors").write_bytes(text.encode())
    words, matrix = read(tmp_path / "vectors")
    assert words == ["a", "b"]
    np.testing.assert_array_equal(matrix, np.array([[1, -2.5, 0.3], [1, 0.5, 2]], np.float32))


@pytest.mark.parametrize("first", [0, 1])
def test_glove_words_with_blanks(tmp_path, first):
    lines = ["a 1 2 3", ". . . 4 5 6", "at name@domain.com 7 8 9", "10 10 11 12"]
    words = ["a", ". . .", "at name@domain.com", "10"]
    (tmp_path / "vectors").write_text("\n".join(lines[first:]) + "\n")
    found, matrix = read(tmp_path / "vectors")
    assert found == words[first:]
    np.testing.assert_array_equal(matrix, np.arange(1, 13).reshape(4, 3)[first:])
    assert read(tmp_path / "vectors", keep=[". . .", "at"])[0] == [". . ."]


def test_a_word_that_stands_twice_keeps_its_first_vector(tmp_path, caplog):
    (tmp_path / "vectors").write_text("4 1\na 1\nb 2\na 3\na 4\n")
    words, matrix = read(tmp_path / "vectors")
    (line,) = caplog.messages
    assert line.endswith("vectors: 2 rows repeat a word, as 'a'; the first vector of each is kept")
    assert words == ["a", "b"] and matrix.tolist() == [[1], [2]]


@pytest.mark.parametrize("format", FORMATS)
def test_words_that_are_no_utf8(tmp_path, format, caplog):
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = tmp_path / "vectors"
    write(path, ["x", "good", "bad!"], matrix, format)
    path.write_bytes(path.read_bytes().replace(b"bad!", b"bad\xff"))
    with pytest.raises(VectorsError, match=r"vectors: word 3, b'bad\\xff', is not UTF-8: write the file as UTF-8"):
        read(path)
    words, again = read(path, invalid="skip")
    assert caplog.messages[-1].endswith("1 words were no UTF-8 (invalid=skip)")
    assert words == ["x", "good"] and again.tolist() == matrix[:2].tolist()
    words, again = read(path, invalid="replace")
    assert caplog.messages[-1].endswith("1 words were no UTF-8 (invalid=replace)")
    assert words == ["x", "good", "bad\ufffd"] and again.tolist() == matrix.tolist()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "vectors is empty"),
        ("\n \n", "vectors is empty"),
        (TEXT.replace("3 2", "4 2"), "vectors: 3 words where the header names 4"),
        (TEXT.replace("3 2", "2 2"), ":4: more than the 2 words that the header names"),
        (TEXT.replace("3 2", "0 2"), ":1: the header names 0 words of 2 dimensions"),
        (TEXT.replace("3 2", "3 0"), ":1: the header names 3 words of 0 dimensions"),
        (TEXT.replace("3 2", "3 3"), ":2: 2 numbers where the header names 3: 'a 1 2'"),
        (TEXT.replace("b 3 4", "b 3"), ":3: 1 numbers where the header names 2: 'b 3'"),
        (TEXT.replace("b 3 4", "b 3 4 5"), ":3: 3 numbers where the header names 2: 'b 3 4 5'"),
        (TEXT.replace("b 3 4", "b 3 four"), ":3: no number: 'four'"),
        (TEXT.replace("b 3 4", "b 3 1_0"), ":3: no number: '1_0'"),
        (TEXT.replace("b 3 4", "b 3 nan"), "the vector of 'b' holds numbers that are not finite"),
        (TEXT.replace("b 3 4", "b 3 1e39"), "the vector of 'b' holds numbers that are not finite"),
        (TEXT[4:].replace("b 3 4", "b 3"), ":2: 1 numbers where the first line has 2: 'b 3'"),
        (TEXT[4:].replace("c 5 6", "c"), ":3: 0 numbers where the first line has 2: 'c'"),
        ("a line of text\n", ":1: expected a word and numbers, not 'a line of text'"),
    ],
)
def test_text_that_is_wrong(tmp_path, text, words):
    (tmp_path / "vectors").write_text(text)
    with pytest.raises(VectorsError, match=words) as e:
        read(tmp_path / "vectors")
    assert "\n" not in str(e.value)


def test_binary_that_is_wrong(tmp_path, matrix):
    path = tmp_path / "vectors"
    write(path, WORDS, matrix, "word2vec_binary")
    good = path.read_bytes()
    for cut in range(len(good) - 22, len(good) - 1):  # without the last line feed it is still whole
        path.write_bytes(good[:cut])
        with pytest.raises(VectorsError, match="cut short behind word 7 of the 8 that the first line names"):
            read(path)
    path.write_bytes(good.replace(b"8 5", b"7 5"))
    with pytest.raises(VectorsError, match="more than the 7 words that the first line names"):
        read(path)
    path.write_bytes(good.replace(b"8 5", b"9 5"))
    with pytest.raises(VectorsError, match="cut short behind word 8 of the 9"):
        read(path)
    for header in (b"8 4", b"8 6", b"8 1", b"8 999999999999"):
        path.write_bytes(good.replace(b"8 5", header))
        with pytest.raises(VectorsError, match="another width than the file has|cut short|more than the 8|not finite"):
            read(path, "word2vec_binary")
    path.write_bytes(good.replace(b"nan ", b" "))
    with pytest.raises(VectorsError, match="no word 8: damaged"):
        read(path)
    path.write_bytes(b"2 2\na " + b"\0" * 8 + b"x" * (formats.LONGEST + 1))
    with pytest.raises(VectorsError, match="no word 2: damaged"):
        read(path)
    path.write_bytes(b"1 1\na " + np.array(np.inf, np.float32).tobytes())
    with pytest.raises(VectorsError, match="'a' holds numbers that are not finite"):
        read(path)


def test_other_bad_input(tmp_path, matrix):
    path = tmp_path / "vectors.gz"
    with pytest.raises(VectorsError, match="gone is not a file"):
        read(tmp_path / "gone")
    write(path, WORDS, matrix)
    for options, words in (
        ({"format": "csv"}, "format='csv' is not one of word2vec, word2vec_binary, glove"),
        ({"invalid": "ignore"}, "invalid='ignore' is not one of strict, skip, replace"),
        ({"limit": 0}, "limit=0 is below 1"),
    ):
        with pytest.raises(VectorsError, match=words):
            read(path, **options)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(VectorsError, match=r"vectors.gz: damaged or cut short"):
        read(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(VectorsError, match="is empty"):
        read(path)
    (tmp_path / "glove").write_text(TEXT[4:])
    for format in ("word2vec", "word2vec_binary"):
        with pytest.raises(VectorsError, match=":1: expected the numbers of words and of dimensions, not 'a 1 2'"):
            read(tmp_path / "glove", format)


def test_what_is_not_written(tmp_path, matrix):
    path = tmp_path / "vectors"
    write(path, WORDS, matrix)
    before = path.read_bytes()
    bad = matrix.copy()
    bad[3, 1] = np.nan
    for words, rows, format, text in (
        (WORDS[1:], matrix, "glove", r"7 words with a matrix \(8, 5\): expected a row each"),
        ([], matrix[:0], "glove", r"0 words with a matrix \(0, 5\)"),
        (WORDS, matrix[:, 0], "glove", r"8 words with a matrix \(8,\)"),
        (WORDS, bad, "glove", "the vector of '東京' holds numbers that are not finite"),
        (["a", "a"], matrix[:2], "glove", "vectors: 'a' stands twice"),
        (["a", "b c"], matrix[:2], "word2vec", "'b c' is empty, holds a blank or is not UTF-8"),
        (["a", ""], matrix[:2], "word2vec", "'' is empty, holds"),
        (["a", "b\n"], matrix[:2], "word2vec_binary", r"'b\\n' is empty, holds"),
        (["a", "\ud800"], matrix[:2], "word2vec", "is not UTF-8"),
        (WORDS, matrix, "csv", "format='csv' is not one of"),
    ):
        with pytest.raises(VectorsError, match=text):
            write(path, words, rows, format)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
