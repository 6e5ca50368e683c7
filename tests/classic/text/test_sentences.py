"""Sentences as numbers: thresholds, ends, blanks, compression, and text that is not UTF-8."""

import gzip

import numpy as np
import pytest

from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN, Reader, TextError, Vocabulary, read


@pytest.fixture
def file(tmp_path):
    def write(data, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def test_numbers(file):
    vocabulary, text = read(Reader([file("b a\n\n a  b\tb \nc")]))
    assert vocabulary.words == ["<unk>", "<s>", "</s>", "b", "a", "c"]
    assert text.tolist() == [BEGIN, 3, 4, END, BEGIN, 4, 3, 3, END, BEGIN, 5, END]
    assert vocabulary.encode(["a", "z", "<s>"]).tolist() == [BEGIN, 4, UNKNOWN, UNKNOWN, END]


def test_lines_at_once():
    vocabulary = Vocabulary(
        ["b", "é\u00a0è", "of two", "nul\0", "", "a word of more than sixty-four bytes ".replace(" ", "_") * 3]
    )
    lines = ["b b\tz  é\u00a0è", "", " of two", f"<s> {vocabulary.words[-1]} nul nul\0", "b"]
    words = [["b", "b", "z", "é\u00a0è"], [], ["of", "two"], ["<s>", vocabulary.words[-1], "nul", "nul"], ["b"]]
    expected = np.concatenate([vocabulary.encode(sentence) for sentence in words])
    np.testing.assert_array_equal(vocabulary.encode_lines(lines), expected)
    assert len(vocabulary.encode_lines([])) == 0
    odd = Vocabulary(["s", "on", "\ud800"])
    np.testing.assert_array_equal(odd.encode_lines(["elephants \ud800"]), odd.encode(["elephants", "\ud800"]))
    with pytest.raises(ValueError, match="line of its own"):
        vocabulary.encode_lines(["a\nb"])


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_letter(coding, file):
    text, words = "b a\u2028é\n\nb\x85 a\n", "b\na\n"
    want = read(Reader([file(text)]))
    got = read(Reader([file(text.encode(coding), "marked.txt")]))
    assert got[0].words == want[0].words and got[1].tolist() == want[1].tolist()
    assert sentences.read_vocabulary(file(words.encode(coding), "words.txt")).words[3:] == ["b", "a"]


def test_empty_lines_may_stay(file):
    vocabulary, _ = read(Reader([file("a\n")]))
    _, text = read(Reader([file("\na\n\n")]), vocabulary=vocabulary, keep_empty=True)
    assert text.tolist() == [BEGIN, END, BEGIN, 3, END, BEGIN, END]


def test_thresholds(file):
    path = file("a a a b b c\nd d <s> <s> <s>\n")
    vocabulary, text = read(Reader([path]), min_count=2)
    assert vocabulary.words[3:] == ["a", "b", "d"]
    assert text.tolist().count(UNKNOWN) == 4  # c, and what is spelled as the beginning of a sentence
    assert read(Reader([path]), max_size=1)[0].words[3:] == ["a"]


def test_compressed_and_in_pieces(file):
    lines = "".join(f"w{i} x{i % 7}\n" for i in range(1000))
    whole = read(Reader([file(lines)]))
    packed = read(Reader([file(gzip.compress(lines.encode()), "text.gz")], block=100))
    assert packed[0].words == whole[0].words
    np.testing.assert_array_equal(packed[1], whole[1])


def test_words_beyond_ascii_are_cut_at_ascii_blanks_only(file):
    vocabulary, _ = read(Reader([file("é\u00a0è \u2003x\n")]))
    assert vocabulary.words[3:] == ["é\u00a0è", "\u2003x"]


@pytest.mark.parametrize("policy, words", [("skip", ["a"]), ("replace", ["a", "b\ufffd"])])
def test_no_utf8(file, policy, words):
    reader = Reader([file(b"a\nb\xff\na\n")], policy)
    assert read(reader)[0].words[3:] == words
    assert reader.invalid == 1


def test_only_line_feeds_end_lines(file):
    reader = Reader([file(b"a\rb\xff c\nd e\n")], "skip")
    assert read(reader)[0].words[3:] == ["d", "e"]
    with pytest.raises(TextError, match="text.txt:1 is not UTF-8"):
        read(Reader([file(b"a\rb\xff c\nd e\n")]))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:40] + b"xx" + data[42:]])
def test_damaged_files(file, damage):
    data = gzip.compress("".join(f"w{i}\n" for i in range(1000)).encode())
    with pytest.raises(TextError, match="text.gz: damaged or cut short"):
        read(Reader([file(damage(data), "text.gz")]))


@pytest.mark.parametrize(
    "data, options, words",
    [
        (b"a\nb\xff\n", {}, "text.txt:2 is not UTF-8"),
        (b"", {}, "text.txt: no word in the corpus"),
        (b"\n \n", {}, "text.txt: no word in the corpus"),
        (b"", {"vocabulary": Vocabulary(["a"])}, "text.txt: no word in the corpus"),
        (b"a b c\n", {"min_count": 2}, "no word occurs min_count=2 times: take a smaller"),
        (b"<s> </s>\n", {}, "no word occurs min_count=1 times; special words are none"),
    ],
)
def test_errors(file, data, options, words):
    with pytest.raises(TextError, match=words):
        read(Reader([file(data)]), **options)


def test_errors_of_files(tmp_path):
    with pytest.raises(TextError, match="gone.txt is not a file"):
        Reader([tmp_path / "gone.txt"])
    with pytest.raises(TextError, match="matches nothing"):
        Reader([])
    with pytest.raises(TextError, match="invalid='drop' is not one of"):
        Reader([tmp_path], "drop")
    with pytest.raises(TextError, match="names 'a' twice"):
        Vocabulary(["a", "a"])


def test_files_of_vocabularies(file):
    assert sentences.read_vocabulary(file("b\r\n\n a \n<s>\n")).words[3:] == ["b", "a"]


@pytest.mark.parametrize(
    "data, words",
    [
        ("a\nthe 500\n", "text.txt:2: expected a word a line, without counts or blanks, not 'the 500'"),
        (b"a\nb\xff\n", "text.txt:2 is not UTF-8"),
        ("\n<s>\n", "text.txt names no word"),
        ("a\nb\na\n", "names 'a' twice"),
    ],
)
def test_errors_of_vocabularies(file, data, words):
    with pytest.raises(TextError, match=words):
        sentences.read_vocabulary(file(data))
    with pytest.raises(TextError, match="gone.txt is not a file"):
        sentences.read_vocabulary("gone.txt")


def test_thresholds_are_of_a_vocabulary_that_the_text_makes(file):
    with pytest.raises(TypeError, match="min_count: only where no vocabulary is given"):
        read(Reader([file("a\n")]), Vocabulary(["a"]), min_count=2)
