"""Counts of words around words: against loops and dense formulas, in memory and through files, and on real text."""

import gzip
import re

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from letters import TEXT

from llm_jax.classic.ngrams import streaming
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN, Reader, TextError
from llm_jax.classic.vectors import streamed_co_occurrence
from llm_jax.classic.vectors.co_occurrence import (
    CountsError,
    cooccurrences,
    cosine,
    one_hot,
    ppmi,
    svd_vectors,
)

WEIGHTS = {"flat": lambda d, w: 1, "harmonic": lambda d, w: 1 / d, "linear": lambda d, w: (w - d + 1) / w}


def looped(text, size, window, weighting, symmetric):
    """What `cooccurrences` should be, word by word."""
    out = np.zeros((size, size))
    for sentence in " ".join(map(str, text)).split(str(BEGIN) + " ")[1:]:
        words = [int(w) for w in sentence.split()][:-1]
        for i, left in enumerate(words):
            for distance, right in enumerate(words[i + 1 : i + 1 + window], start=1):
                if left > END and right > END:
                    out[left, right] += WEIGHTS[weighting](distance, window)
                    out[right, left] += WEIGHTS[weighting](distance, window) * symmetric
    return out


def drawn(seed, size=8, length=60):
    """Sentences with unknown words, empty ones among them."""
    rng = np.random.default_rng(seed)
    words = rng.choice([UNKNOWN, END, *range(3, size)], length)
    return sentences.with_begins(np.append(words, END).astype(np.int32), keep_empty=True)


@pytest.fixture
def letters(tmp_path):
    (tmp_path / "text.txt").write_text("\n" + TEXT * 3)
    return Reader([tmp_path / "text.txt"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("window", [1, 2, 5, 1 << 40])
def test_equals_loops(window, weighting, symmetric):
    for seed in range(3):
        text = drawn(seed)
        got = cooccurrences(text, 8, window, weighting, symmetric)
        assert got.has_canonical_format and got.dtype == (np.int64 if weighting == "flat" else np.float64)
        np.testing.assert_allclose(got.toarray(), looped(text, 8, window, weighting, symmetric), rtol=1e-12)


def test_unknown_words_keep_their_places_and_sentences_are_apart():
    text = np.array([BEGIN, 3, UNKNOWN, 4, END, BEGIN, 5, END])
    assert cooccurrences(text, 6, 1).nnz == 0
    found = cooccurrences(text, 6, 9, "harmonic").toarray()
    assert found[3, 4] == found[4, 3] == 0.5 and found.sum() == 1.0


def test_sides():
    text = drawn(1)
    right = cooccurrences(text, 8, 3, "linear", symmetric=False)
    both = scipy.sparse.hstack([right.T, right], "csr")
    np.testing.assert_allclose((both[:, :8] + both[:, 8:]).toarray(), cooccurrences(text, 8, 3, "linear").toarray())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("block, pairs, span", [(40, 20, 2), (40, 1 << 24, 1 << 22), (1 << 23, 7, 8)])
def test_files_equal_memory(letters, tmp_path, block, pairs, span, weighting, symmetric):
    vocabulary, text = sentences.read(letters, min_count=4)
    want = cooccurrences(text, len(vocabulary), 3, weighting, symmetric)
    again, got = streamed_co_occurrence.cooccurrences(
        Reader(letters.paths, block=block),
        tmp_path,
        3,
        weighting,
        symmetric,
        pairs,
        streaming.Merge(span, 2),
        min_count=4,
    )
    assert again.words == vocabulary.words and got.dtype == want.dtype
    np.testing.assert_array_equal(got.indptr, want.indptr)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_allclose(got.data, want.data, rtol=0 if weighting == "flat" else 1e-12)
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "columns", "values"}


def test_files_without_pairs(tmp_path):
    (tmp_path / "text.txt").write_text("a\nb\n")
    reader = Reader([tmp_path / "text.txt"])
    assert streamed_co_occurrence.cooccurrences(reader, tmp_path, 2)[1].nnz == 0
    with pytest.raises(CountsError, match="window=0 must be at least 1"):
        streamed_co_occurrence.cooccurrences(reader, tmp_path, 0)
    with pytest.raises(TextError, match="min_count=2"):
        streamed_co_occurrence.cooccurrences(reader, tmp_path, 2, min_count=2)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("shift, smoothing", [(1, 1.0), (5, 0.75)])
def test_ppmi_equals_the_dense_formula(shift, smoothing, positive):
    found = cooccurrences(drawn(2, size=30, length=80), 31, 2, "harmonic")  # word 30 is never seen
    dense = found.toarray()
    context = dense.sum(0) ** smoothing / (dense.sum(0) ** smoothing).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.log(dense / dense.sum() / (dense.sum(1)[:, None] / dense.sum() * context[None])) - np.log(shift)
    want = np.where(dense > 0, np.maximum(want, 0) if positive else want, 0)
    got = ppmi(found, shift, smoothing, positive)
    np.testing.assert_allclose(got.toarray(), want, atol=1e-12)
    assert (want > 0).any() and (not positive or got.nnz == (want > 0).sum())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_svd_vectors(exponent):
    matrix = scipy.sparse.random(30, 20, 0.3, "csr", rng=np.random.default_rng(0))
    got = svd_vectors(matrix, 6, exponent)
    u, values, _ = np.linalg.svd(matrix.toarray())
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), values[:6] ** exponent, rtol=1e-8)  # descending, too
    want = u[:, :6] * values[:6] ** exponent
    np.testing.assert_allclose(got, want * np.sign((got * want).sum(axis=0)), atol=1e-8)
    assert (got[np.abs(got).argmax(axis=0), range(6)] > 0).all()
    np.testing.assert_array_equal(got, svd_vectors(matrix, 6, exponent))
    np.testing.assert_allclose(got, svd_vectors(matrix, 6, exponent, seed=1), atol=1e-8)


def test_cosine():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    a[1] = 0
    want = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) if x.any() else 0 for y in b] for x in a]
    for kind in (np.asarray, scipy.sparse.csr_matrix):
        np.testing.assert_allclose(cosine(kind(a), kind(b)), want, atol=1e-15)
    with pytest.raises(CountsError, match=r"shapes \(3, 5\) and \(2, 4\)"):
        cosine(a, np.ones((2, 4)))


def test_one_hot_knows_no_similarity():
    assert one_hot([2, 0], 3).toarray().tolist() == [[0, 0, 1], [1, 0, 0]]
    np.testing.assert_array_equal(cosine(one_hot(range(9), 9), one_hot(range(9), 9)), np.eye(9))
    for wrong in ([3], [-1]):
        with pytest.raises(CountsError, match="below size=3"):
            one_hot(wrong, 3)


TWO = np.array([BEGIN, 3, 4, END])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cooccurrences(TWO, 5, 0), "window=0 must be at least 1"),
        (lambda: cooccurrences(TWO, 5, 2, "cubic"), "weighting='cubic' is not one of flat, harmonic, linear"),
        (lambda: cooccurrences(TWO, 4, 2), "words 1 to 4 are not all in the vocabulary of size=4"),
        (lambda: cooccurrences(TWO[:0], 5, 2), "empty or does not begin with <s>"),
        (lambda: cooccurrences(TWO[1:], 5, 2), "empty or does not begin with <s>"),
        (lambda: cooccurrences(TWO, 1 << 30, 9, "linear"), "1,073,741,824 words in a window of 9 do not fit 64 bits"),
        (lambda: ppmi(cooccurrences(np.array([BEGIN, 3, END]), 4, 2)), "hold no pair"),
        (lambda: ppmi(-cooccurrences(TWO, 5, 2)), "finite and not negative"),
        (lambda: ppmi(cooccurrences(TWO, 5, 2) * np.nan), "finite and not negative"),
        (lambda: ppmi(cooccurrences(TWO, 5, 2), shift=0), "shift=0 and smoothing=1.0 must be positive"),
        (lambda: ppmi(cooccurrences(TWO, 5, 2), smoothing=float("nan")), "smoothing=nan must be positive"),
        (lambda: svd_vectors(cooccurrences(TWO, 5, 2), 5), "dim=5 must be at least 1 and below both sides"),
        (lambda: svd_vectors(cooccurrences(TWO, 5, 2), 0), "dim=0 must be at least 1"),
    ],
)
def test_errors(call, words):
    with pytest.raises(CountsError, match=words):
        call()


def austen(folder, path):
    """Vocabulary and counts of the words that six novels hold twenty times."""
    novels = [gzip.decompress(p.read_bytes()).decode().lower() for p in sorted(folder.glob("*.txt.gz"))]
    lines = (re.findall("[a-z]+", s) for novel in novels for s in re.split(r"[.!?;]|\n\n", novel))
    path.write_text("\n".join(" ".join(words) for words in lines))
    vocabulary, text = sentences.read(Reader([path]), min_count=20)
    return vocabulary, cooccurrences(text, len(vocabulary), 5)


def test_counts_know_similarity(shared_data, tmp_path):
    """Measured: 37 pairs of WordSim-353 are known, Spearman 0.46."""
    vocabulary, found = austen(shared_data / "austen", tmp_path / "austen.txt")
    vectors = svd_vectors(ppmi(found, smoothing=0.75), 30)
    for word, expected in {"sister": "brother", "three": "four", "house": "cottage", "monday": "tuesday"}.items():
        near = np.argsort(-cosine(vectors[[vocabulary.index[word]]], vectors)[0])[1:6]
        assert expected in [vocabulary.words[i] for i in near], (word, [vocabulary.words[i] for i in near])
    rows = [
        r.lower().split("\t") for r in (shared_data / "word_similarity" / "wordsim353.tsv").read_text().splitlines()
    ]
    known = [r for r in rows if r[0] in vocabulary.index and r[1] in vocabulary.index]
    a, b = ([vocabulary.index[r[i]] for r in known] for i in (0, 1))
    size = len(vocabulary)
    assert len(known) > 30 and not np.diag(cosine(one_hot(a, size), one_hot(b, size))).any()
    similar = np.diag(cosine(vectors[a], vectors[b]))
    assert scipy.stats.spearmanr(similar, [float(r[2]) for r in known]).statistic > 0.38
