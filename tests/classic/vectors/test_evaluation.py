"""Likeness and analogies: read, counted by hand, in blocks; and what is refused."""

import math

import numpy as np
import pytest
import scipy.stats

from llm_jax.classic.vectors.evaluation import (
    Accuracy,
    evaluate_analogies,
    evaluate_similarity,
    read_pairs,
    read_questions,
)
from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors

SQUARE = WordVectors(
    ["man", "woman", "king", "queen", "Man", "KING", "other"],
    [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0.1, 1, 0, 1], [0, 1, 0, 1.1], [0, 1, 0, 1], [1, 1, -1, -1]],
)
QUESTIONS = {
    "family": [("man", "woman", "king", "queen"), ("man", "woman", "king", "other"), ("man", "woman", "king", "child")],
    "gram1": [("woman", "man", "queen", "king")],
    "gram2": [("a", "b", "c", "d")],
}


def test_shared_files(shared_data):
    folder = shared_data / "word_similarity"
    assert [len(read_pairs(folder / f)) for f in ("wordsim353.tsv", "simlex999.txt")] == [353, 999]
    assert read_pairs(folder / "wordsim353.tsv")[0] == ("love", "sex", 6.77)
    sections = read_questions(folder / "questions-words.txt")
    assert sum(map(len, sections.values())) == 19544 and len(sections) == 14
    assert sum(name.startswith("gram") for name in sections) == 9
    assert sections["capital-common-countries"][0] == ("Athens", "Greece", "Baghdad", "Iraq")


@pytest.mark.parametrize("method", ["3cosadd", "3cosmul"])
def test_analogies_by_hand(method):
    """Other spellings of the three words are not answers, or `KING` and `Man` would win."""
    got = evaluate_analogies(SQUARE, QUESTIONS, method)
    assert got.sections == {"family": Accuracy(1, 2, 1), "gram1": Accuracy(1, 1, 0), "gram2": Accuracy(0, 0, 1)}
    assert got.total == (2, 3, 2) and got.semantic == (1, 2, 1) and got.syntactic == (1, 1, 1)
    assert got.total.share == 2 / 3 and math.isnan(got.sections["gram2"].share)
    cased = evaluate_analogies(SQUARE, QUESTIONS, method, ignore_case=False)
    assert cased.total.asked == 3 and cased.sections["family"].correct == 0
    upper = {"x": [tuple(w.upper() for w in q) for q in QUESTIONS["family"]]}
    assert evaluate_analogies(SQUARE, upper, method).total == (1, 2, 1)
    assert evaluate_analogies(SQUARE, upper, method, ignore_case=False).total == (0, 0, 3)
    assert evaluate_analogies(SQUARE, QUESTIONS, method, limit=3).total == (0, 0, 5)
    assert evaluate_analogies(SQUARE, QUESTIONS, method, limit=4, ignore_case=False).total == (2, 2, 3)


@pytest.mark.parametrize("method", ["3cosadd", "3cosmul"])
def test_analogies_one_by_one(method):
    """In small blocks, the same as asked one by one."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    vectors = WordVectors(words, rng.normal(size=(60, 3)))
    questions = [tuple(words[i] for i in rng.choice(60, 3, replace=False)) for _ in range(50)]
    answers = [vectors.analogy(*q, top=1, method=method)[0][0] for q in questions]
    sections = {"right": [(*q, a) for q, a in zip(questions, answers, strict=True)]}
    sections["wrong"] = [(*q, words[words.index(a) - 1]) for q, a in zip(questions, answers, strict=True)]
    for rows, at_once in ((8192, 512), (7, 11)):
        got = evaluate_analogies(vectors, sections, method, block=(rows, at_once)).sections
        assert got == {"right": Accuracy(50, 50, 0), "wrong": Accuracy(0, 50, 0)}


def test_likeness():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    vectors = WordVectors([w.upper() for w in words], rng.normal(size=(30, 4)))
    pairs = [(words[i], words[j], float(s)) for i, j, s in rng.integers(0, 30, (25, 3))]  # scores with ties
    got = evaluate_similarity(vectors, [*pairs, ("w1", "none", 3.0)])
    cosines = vectors.similarity([(a.upper(), b.upper()) for a, b, _ in pairs])
    scores = [s for _, _, s in pairs]
    assert got.pairs == 25 and got.missing == 1
    assert got.spearman == pytest.approx(scipy.stats.spearmanr(cosines, scores)[0], abs=1e-12)
    assert got.pearson == pytest.approx(scipy.stats.pearsonr(cosines, scores)[0], abs=1e-6)
    none = evaluate_similarity(vectors, pairs, ignore_case=False)
    assert math.isnan(none.spearman) and none[2:] == (0, 25)
    few = evaluate_similarity(vectors, pairs, limit=10)
    assert few.pairs == sum(int(a[1:]) < 10 and int(b[1:]) < 10 for a, b, _ in pairs) and few.pairs + few.missing == 25
    same = evaluate_similarity(vectors, [(a, b, 1.0) for a, b, _ in pairs])
    assert math.isnan(same.spearman) and math.isnan(same.pearson) and same.pairs == 25


@pytest.mark.parametrize(
    "read, data, words",
    [
        (read_pairs, b"# a\nlove\tsex\t6.77\nlove\tsex\n", ":3: expected two words and a score between tabs"),
        (read_pairs, b"love\tsex\tnan\n", ":1: expected two words and a score"),
        (read_pairs, b"love\tsex\tmuch\n", ":1: expected two words and a score between tabs, not 'love"),
        (read_pairs, b"love\tsex\t1\t2\n", ":1: expected two words"),
        (read_pairs, b"# nothing\n", "holds no pair of words"),
        (read_pairs, b"\xff\n", r"is not UTF-8 \(invalid start byte at byte 0\)"),
        (read_questions, b"a b c d\n", ":1: expected ': section' before the first analogy, not 'a b c d'"),
        (read_questions, b": x\na b c\n", ":2: expected four words, not 'a b c'"),
        (read_questions, b": x\n", "holds no analogy"),
    ],
)
def test_files_that_are_wrong(tmp_path, read, data, words):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(VectorsError, match=words):
        read(tmp_path / "file")
    with pytest.raises(VectorsError, match="gone is not a file"):
        read(tmp_path / "gone")


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_test_sets_with_a_byte_order_mark(tmp_path, coding):
    (tmp_path / "pairs").write_bytes("love\tsex\t6.77\n".encode(coding))
    assert read_pairs(tmp_path / "pairs") == [("love", "sex", 6.77)]
    (tmp_path / "questions").write_bytes(": x\na b c d\n".encode(coding))
    assert read_questions(tmp_path / "questions") == {"x": [("a", "b", "c", "d")]}


def test_bad_options():
    with pytest.raises(VectorsError, match="limit=0 is below 1"):
        evaluate_analogies(SQUARE, QUESTIONS, limit=0)
    with pytest.raises(VectorsError, match="limit=0 is below 1"):
        evaluate_similarity(SQUARE, [], limit=0)
    with pytest.raises(VectorsError, match="method='cos' is not one of"):
        evaluate_analogies(SQUARE, QUESTIONS, "cos")
