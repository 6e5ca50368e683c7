"""Nearest words and analogies against plain computations, and what is refused."""

import numpy as np
import pytest

from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors, combine

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture
def vectors():
    return WordVectors(WORDS, np.random.default_rng(0).normal(size=(40, 6)))


def cosines(vectors, query):
    m = vectors.matrix.astype(float)
    return m @ query / np.linalg.norm(m, axis=1) / np.linalg.norm(query)


def test_nearest(vectors):
    found = vectors.nearest("w3", top=5, exclude=["w7", "none"])
    want = cosines(vectors, vectors.matrix[3].astype(float))
    want[[3, 7]] = -2
    best = np.argsort(-want)[:5]
    assert [w for w, _ in found] == [WORDS[i] for i in best]
    np.testing.assert_allclose([s for _, s in found], want[best], atol=1e-6)
    assert vectors.nearest(vectors.matrix[3] * 7, top=1)[0] == ("w3", pytest.approx(1))


def test_all_words_at_most(vectors):
    found = vectors.nearest("w3", top=1000)
    assert sorted(w for w, _ in found) == sorted(set(WORDS) - {"w3"})
    scores = [s for _, s in found]
    assert scores == sorted(scores, reverse=True)
    assert vectors.nearest("w3", exclude=WORDS) == []


def test_search_in_blocks(vectors):
    queries = np.random.default_rng(1).normal(size=(9, 6))
    whole = vectors.search(queries, 4, [[w] for w in WORDS[:9]])
    parts = vectors.search(queries, 4, [[w] for w in WORDS[:9]], max_scores=100)
    assert [[w for w, _ in row] for row in parts] == [[w for w, _ in row] for row in whole]
    for i, row in enumerate(whole):
        assert WORDS[i] not in dict(row)
        one = vectors.nearest(queries[i], 4, [WORDS[i]])
        assert [w for w, _ in one] == [w for w, _ in row]


def test_similarity(vectors):
    got = vectors.similarity([("w0", "w1"), ("w5", "w5")])
    np.testing.assert_allclose(got, [cosines(vectors, vectors.matrix[0].astype(float))[1], 1], atol=1e-6)


@pytest.mark.parametrize("method", ["3cosadd", "3cosmul"])
def test_analogy(vectors, method):
    a, b, c = (cosines(vectors, vectors.matrix[i].astype(float)) for i in (1, 2, 3))
    if method == "3cosadd":
        unit = [vectors.matrix[i] / np.linalg.norm(vectors.matrix[i].astype(float)) for i in (1, 2, 3)]
        want = (b - a + c) / np.linalg.norm(unit[1] - unit[0] + unit[2])
    else:
        want = (1 + b) / 2 * (1 + c) / 2 / ((1 + a) / 2 + 1e-3)
    want[[1, 2, 3]] = -np.inf
    found = vectors.analogy("w1", "w2", "w3", top=4, method=method)
    best = np.argsort(-want)[:4]
    assert [w for w, _ in found] == [WORDS[i] for i in best]
    np.testing.assert_allclose([s for _, s in found], want[best], rtol=1e-4)


@pytest.mark.parametrize("method", ["3cosadd", "3cosmul"])
def test_an_analogy_that_holds(method):
    """Sums of two orthogonal parts: the fourth corner of a square."""
    places = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [1, 1, -1, -1]])
    vectors = WordVectors(["man", "woman", "king", "queen", "other"], places)
    assert vectors.analogy("man", "woman", "king", top=1, method=method)[0][0] == "queen"


def test_scaling_changes_nothing(vectors):
    scaled = WordVectors(WORDS, vectors.matrix * np.linspace(0.1, 9, 40)[:, None])
    for method in ("3cosadd", "3cosmul"):
        one, other = (v.analogy("w1", "w2", "w3", method=method) for v in (vectors, scaled))
        assert [w for w, _ in one] == [w for w, _ in other]


def test_zero_is_near_nothing():
    vectors = WordVectors(["a", "b", "zero"], [[1, 0], [1, 1], [0, 0]])
    assert dict(vectors.nearest("a"))["zero"] == 0
    assert [s for _, s in vectors.nearest("zero")] == [0, 0]


def test_bad_input(vectors):
    with pytest.raises(VectorsError, match=r"40 words with a matrix \(39, 6\): expected a row each"):
        WordVectors(WORDS, vectors.matrix[1:])
    with pytest.raises(VectorsError, match=r"0 words with a matrix \(0, 6\)"):
        WordVectors([], vectors.matrix[:0])
    with pytest.raises(VectorsError, match="'b' stands twice"):
        WordVectors(["a", "b", "c", "b"], vectors.matrix[:4])
    for bad in (np.nan, np.inf, 1e30):
        matrix = vectors.matrix.copy()
        matrix[4, 2] = bad
        with pytest.raises(VectorsError, match="the vector of 'w4' holds numbers that are not finite, or too large"):
            WordVectors(WORDS, matrix)
    with pytest.raises(VectorsError, match="'none' is not among the 40 words$"):
        vectors.nearest("none")
    with pytest.raises(VectorsError, match="'W3' is not among the 40 words; 'w3' is"):
        vectors.analogy("w1", "w2", "W3")
    with pytest.raises(VectorsError, match="'none' is not among"):
        vectors.similarity([("w1", "none")])
    with pytest.raises(VectorsError, match="top=0 is below 1"):
        vectors.nearest("w1", top=0)
    with pytest.raises(VectorsError, match="expected finite vectors of 6 numbers"):
        vectors.nearest(np.ones(5))
    with pytest.raises(VectorsError, match="expected finite vectors of 6 numbers"):
        vectors.nearest(np.full(6, np.nan))
    with pytest.raises(VectorsError, match="method='cos' is not one of 3cosadd, 3cosmul"):
        vectors.analogy("w1", "w2", "w3", method="cos")
    with pytest.raises(VectorsError, match="method='cos'"):
        combine(np.ones(1), np.ones(1), np.ones(1), "cos")
