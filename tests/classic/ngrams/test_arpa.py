"""ARPA files: written and read, both dialects, and what is wrong with others."""

import pathlib
import warnings

import numpy as np
import pytest
from letters import PRUNED, TEXT

from llm_jax.classic.ngrams import arpa, counting, smoothing
from llm_jax.classic.ngrams.arpa import ArpaError
from llm_jax.classic.text import sentences

GOOD = """a comment

\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.5 a -0.25
-0.4\t</s>

\\2-grams:
-0.1\t<s> a
-0.2 a </s>

\\end\\
"""


# Written by IRSTLM 6.00.05 (`tlm -lm=ikn -n=3`, its improved Kneser-Ney) from 18 sentences of Austen's Emma.
IRSTLM = pathlib.Path(__file__).with_name("irstlm.arpa")
LINES = (
    "must in the , to be .",
    "the",
    "but not to the to for a ; -- and the to be ?",
    "they to be mr .",
    "weston ' s , .",
    "all that .",
    "it all over with mr .",
    "and as for , be very he going to , of his ' s .",
)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    vocabulary, text = sentences.read(sentences.Reader([path]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smoothing.estimate(counting.count(text, len(vocabulary), 3), vocabulary), text


@pytest.mark.parametrize("name", ["model.arpa", "model.arpa.gz"])
def test_round_trip(model, tmp_path, name):
    ours, text = model
    arpa.write(ours, tmp_path / name)
    again = arpa.read(tmp_path / name)
    assert again.vocabulary.words == ours.vocabulary.words
    np.testing.assert_allclose(again.log_prob(text), ours.log_prob(text), atol=1e-6)


def test_reads_either_dialect(tmp_path):
    """Missing back-offs, blanks in the place of tabs, words in any order."""
    path = tmp_path / "model.arpa"
    path.write_text(GOOD)
    model = arpa.read(path)
    numbers = model.vocabulary.encode(["a", "b"])
    np.testing.assert_allclose(model.log_prob(numbers), [0, -0.1, -0.25 - 1.0, -0.4])
    np.testing.assert_allclose(model.log_prob(model.vocabulary.encode(["a"])), [0, -0.1, -0.2])


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_comment(tmp_path, coding):
    """Behind it `\\data\\` is the first line."""
    path = tmp_path / "model.arpa"
    path.write_bytes(GOOD.removeprefix("a comment\n\n").encode(coding))
    assert arpa.read(path).vocabulary.words[3:] == ["a"]


def test_files_without_all_suffixes(tmp_path):
    """Pruning leaves `<s> a b` without `a b`; a text is still scored as its words one by one."""
    path = tmp_path / "model.arpa"
    path.write_text(PRUNED)
    model = arpa.read(path)
    for line in ("a b a", "a b b", "b a b", "a b a z"):
        text = model.vocabulary.encode(line.split())
        want = [np.log10(model.next(text[:t].tolist())[text[t]]) for t in range(1, len(text))]
        np.testing.assert_allclose(model.log_prob(text)[1:], want)
    assert model.log_prob(model.vocabulary.encode(["a", "b", "a"]))[3] == -0.05


def test_without_unknown_words(tmp_path):
    path = tmp_path / "model.arpa"
    path.write_text(GOOD.replace("-1.0\t<unk>\n", "").replace("1=4", "1=3"))
    model = arpa.read(path)
    assert model.log_prob(model.vocabulary.encode(["z"]))[1] == -0.5 + arpa.UNSEEN_UNKNOWN


@pytest.mark.parametrize(
    "change, words",
    [
        (("ngram 2=2", "ngram 2=3"), "2 2-grams where the header names 3"),
        (("ngram 2=2", "ngram 2=1"), "more than the 1 2-grams that the header names"),
        (("ngram 2=2", "ngram 3=2"), "expected 'ngram 2=COUNT', not 'ngram 3=2'"),
        (("\\2-grams:", "\\3-grams:"), r"expected \\2-grams:, not '\\\\3-grams:'"),
        (("\\end\\\n", ""), "cut short"),
        (("-0.2 a </s>", "-0.2 a"), "expected a number, 2 words"),
        (("-0.2 a </s>", "zero a </s>"), "no number"),
        (("-0.2 a </s>", "-0.2 a b"), "a word of 2-gram 2 is not among the 1-grams"),
        (("-0.2 a </s>", "-0.2 <s> a"), "an n-gram stands twice among the 2-grams"),
        (("-0.4\t</s>", "-0.4\ta"), "a word stands twice among the 1-grams"),
        (("-0.2 a </s>", "0.2 a </s>"), "a log probability among the 2-grams above 0"),
        (("-0.2 a </s>", "nan a </s>"), "above 0, or no number"),
        (("-0.5 a -0.25", "-0.5 a inf"), "above 0, or no number"),
        (("ngram 1=4", "ngram 1=999999999999999"), "4 1-grams where the header names 999,999,999,999,999"),
        (("\\data\\\n", "\\1-grams:\n"), "before"),
        (("ngram 1=4\nngram 2=2\n", ""), "no 'ngram 1=COUNT'"),
    ],
)
def test_errors(tmp_path, change, words):
    path = tmp_path / "model.arpa"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ArpaError, match=words):
        arpa.read(path)


def test_histories_must_be_listed(tmp_path):
    path = tmp_path / "model.arpa"
    third = "\\3-grams:\n-0.1\ta a </s>\n\n"
    path.write_text(GOOD.replace("2=2\n", "2=2\nngram 3=1\n").replace("\\end", third + "\\end"))
    with pytest.raises(ArpaError, match="the first 2 words of 3-gram 1 are not among the 2-grams"):
        arpa.read(path)


def test_other_errors(model, tmp_path):
    with pytest.raises(ArpaError, match="gone.arpa is not a file"):
        arpa.read(tmp_path / "gone.arpa")
    ours, text = model
    arpa.write(ours, tmp_path / "model.arpa.gz")
    data = (tmp_path / "model.arpa.gz").read_bytes()
    (tmp_path / "model.arpa.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArpaError, match="cut short"):
        arpa.read(tmp_path / "model.arpa.gz")
    sized = counting.count(text, len(ours.vocabulary), 2)
    with pytest.raises(ArpaError, match="ARPA files hold back-off tables"):
        arpa.write(smoothing.estimate(sized, ours.vocabulary, "add_k"), tmp_path / "model.arpa")


def test_an_interrupted_file_leaves_the_one_before(model, tmp_path, monkeypatch):
    ours, _ = model
    path = tmp_path / "model.arpa"
    arpa.write(ours, path)
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(arpa.counting, "words_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        arpa.write(ours, path)
    assert [p.name for p in tmp_path.iterdir() if "model" in p.name] == ["model.arpa"] and path.read_bytes() == before


def test_files_in_chunks_are_the_same(model, tmp_path):
    arpa.write(model[0], tmp_path / "whole.arpa")
    arpa.write(model[0], tmp_path / "chunks.arpa", progress=True, chunk=3)
    assert (tmp_path / "chunks.arpa").read_bytes() == (tmp_path / "whole.arpa").read_bytes()
    again = arpa.read(tmp_path / "chunks.arpa", progress=True)
    assert [len(k) for k in again.keys] == [len(k) for k in model[0].keys]


def test_a_file_of_irstlm():
    """As its own `compile-lm --eval` says: 64 words and ends of log10 probability -115.48, perplexity 63.74."""
    model = arpa.read(IRSTLM)
    found = [model.log_prob(model.vocabulary.encode(line.split())) for line in LINES]
    assert sum(len(x) - 1 for x in found) == 64
    total = sum(x.sum() for x in found)
    assert round(total, 2) == -115.48 and round(10 ** (-total / 64), 2) == 63.74
    # of "and as for , be very he going to , of his ' s .", whose words' logarithms it shows with two digits
    shown = [-2.42, -1.67, -2.45, -2.42, -2.42, -2.72, -2.02, -1.42, -1.55, -2.15, -2.26, -0.61, -1.54, -0.07]
    np.testing.assert_allclose(found[-1][3:], shown, atol=0.0051)
