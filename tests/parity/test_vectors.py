"""Word vectors against gensim: its files here and ours there, and the same figures from the same vectors."""

import numpy as np
import pytest

from llm_jax.classic.vectors.evaluation import (
    evaluate_analogies,
    evaluate_similarity,
    read_pairs,
    read_questions,
)
from llm_jax.classic.vectors.plots import pca, tsne
from llm_jax.classic.vectors.word_vectors import WordVectors
from llm_jax.interop.word_vectors.files import FORMATS, read, write

KeyedVectors = pytest.importorskip("gensim.models", reason="gensim is the oracle here").KeyedVectors


def keyed(words, matrix):
    theirs = KeyedVectors(matrix.shape[1])
    theirs.add_vectors(words, matrix)
    return theirs


@pytest.fixture(scope="module")
def small():
    words = ["the", "señor", "3", "東京", "</s>", *(f"w{i}" for i in range(300))]
    return words, np.random.default_rng(0).normal(size=(len(words), 20)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_files(small, tmp_path, format, suffix):
    """Theirs are read here and ours there, bit for bit: their texts have as many digits as a float32 needs."""
    words, matrix = small
    options = {"binary": format == "word2vec_binary"}
    theirs, ours = tmp_path / f"theirs{suffix}", tmp_path / f"ours{suffix}"
    keyed(words, matrix).save_word2vec_format(str(theirs), write_header=format != "glove", **options)
    found, again = read(theirs)
    assert found == words
    np.testing.assert_array_equal(again, matrix)
    write(ours, words, matrix, format)
    loaded = KeyedVectors.load_word2vec_format(str(ours), no_header=format == "glove", **options)
    assert loaded.index_to_key == words
    np.testing.assert_array_equal(loaded.vectors, matrix)


def test_a_part_of_a_file(small, tmp_path):
    words, matrix = small
    write(tmp_path / "vectors", words, matrix, "word2vec_binary")
    theirs = KeyedVectors.load_word2vec_format(str(tmp_path / "vectors"), binary=True, limit=17)
    found, again = read(tmp_path / "vectors", limit=17)
    assert found == theirs.index_to_key
    np.testing.assert_array_equal(again, theirs.vectors)


def test_words_that_stand_twice(tmp_path, caplog):
    (tmp_path / "vectors").write_text("4 2\na 1 2\nb 3 4\na 5 6\nc 7 8\n")
    theirs = KeyedVectors.load_word2vec_format(str(tmp_path / "vectors"))
    found, again = read(tmp_path / "vectors")
    assert "1 rows repeat a word" in caplog.messages[-1]
    assert found == theirs.index_to_key[:3] and theirs.index_to_key[3:] == [None]  # a place that gensim leaves over
    np.testing.assert_array_equal(again, theirs.vectors[:3])


@pytest.mark.filterwarnings("ignore:Call to deprecated")
def test_nearest_and_analogies(small):
    ours, theirs = WordVectors(*small), keyed(*small)
    for word in small[0][:20]:
        _equal(ours.nearest(word, 7), theirs.most_similar(word, topn=7))
        _equal(ours.nearest(2 * ours.matrix[3], 7), theirs.most_similar(2 * ours.matrix[3], topn=7))
    for a, b, c in np.random.default_rng(1).choice(small[0], (20, 3)):
        given = {"positive": [b, c], "negative": [a], "topn": 5}
        if len({a, b, c}) == 3:
            _equal(ours.analogy(a, b, c, 5), theirs.most_similar(**given))
            _equal(ours.analogy(a, b, c, 5, "3cosmul", epsilon=1e-6), theirs.most_similar_cosmul(**given))


def _equal(ours, theirs):
    assert [w for w, _ in ours] == [w for w, _ in theirs]
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], rtol=1e-5, atol=1e-6)


def _random_words(folder):
    """Vectors of the shared files' words in two spellings, some missing; analogies hold now and then."""
    rng = np.random.default_rng(0)
    pairs = [p for f in ("wordsim353.tsv", "simlex999.txt") for p in read_pairs(folder / f)]
    questions = [q for s in read_questions(folder / "questions-words.txt").values() for q in s]
    known = sorted({w for row in (*pairs, *questions) for w in row if isinstance(w, str)})
    known = [w for w in known if rng.random() < 0.9]
    words = [*known, *(w.lower() for w in known if w.lower() not in known), *(f"w{i}" for i in range(300))]
    parts = {w: rng.normal(size=30) for w in words}
    for a, b, c, d in questions[::5]:
        if {a, b, c, d} <= parts.keys():
            parts[d] = parts[b] - parts[a] + parts[c] + 0.7 * rng.normal(size=30)
    order = rng.permutation(len(words))
    return [words[i] for i in order], np.array([parts[words[i]] for i in order], np.float32)


def _trained_words(folder):
    """Vectors that gensim made of the analogies and of pairs, which it reads as sentences."""
    from gensim.models import Word2Vec

    questions = [list(q) for s in read_questions(folder / "questions-words.txt").values() for q in s]
    pairs = [[a, b] for f in ("wordsim353.tsv", "simlex999.txt") for a, b, _ in read_pairs(folder / f)]
    vectors = Word2Vec(questions + 5 * pairs, vector_size=20, min_count=1, epochs=3, workers=1, seed=1).wv
    return vectors.index_to_key, vectors.vectors


@pytest.mark.filterwarnings("ignore:Call to deprecated")  # of gensim, by gensim
@pytest.mark.parametrize("make", [_random_words, _trained_words])
def test_evaluation(shared_data, make):
    folder = shared_data / "word_similarity"
    words, matrix = make(folder)
    ours, theirs = WordVectors(words, matrix), keyed(words, matrix)
    for name in ("wordsim353.tsv", "simlex999.txt"):
        pairs = read_pairs(folder / name)
        for limit, ignore_case in ((None, True), (None, False), (1000, True)):
            got = evaluate_similarity(ours, pairs, limit, ignore_case)
            pearson, spearman, share = theirs.evaluate_word_pairs(
                str(folder / name), restrict_vocab=limit, case_insensitive=ignore_case
            )
            assert got.pairs > 10 and got.pearson == pytest.approx(pearson[0], abs=1e-6)
            assert got.spearman == pytest.approx(spearman[0], abs=1e-5)
            assert 100 * got.missing / len(pairs) == pytest.approx(share)
    sections = read_questions(folder / "questions-words.txt")
    for limit, ignore_case in ((None, True), (2000, False)):
        got = evaluate_analogies(ours, sections, limit=limit, ignore_case=ignore_case)
        share, want = theirs.evaluate_word_analogies(str(folder / "questions-words.txt"), limit, ignore_case)
        counts = [(s["section"], len(s["correct"]), len(s["correct"]) + len(s["incorrect"])) for s in want[:-1]]
        assert [(name, x.correct, x.asked) for name, x in got.sections.items()] == counts
        assert got.total.share == share and got.total.asked + got.total.missing == 19544
        assert 0 < got.total.correct < got.total.asked
    # whatever similarity_function says, gensim's evaluation is by 3CosAdd: 3CosMul is asked one by one
    some = [q[:3] for questions in sections.values() for q in questions[::100] if all(w in theirs for w in q)]
    answers = [theirs.most_similar_cosmul(positive=[b, c], negative=[a], topn=1)[0][0] for a, b, c in some]
    answered = {"some": [(*q, answer) for q, answer in zip(some, answers, strict=True)]}
    got = evaluate_analogies(ours, answered, "3cosmul", ignore_case=False, epsilon=1e-6).total
    assert got == (len(some), len(some), 0)


def test_planes(small):
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is the oracle here")
    ours, theirs = pca(small[1]), decomposition.PCA(2, svd_solver="full").fit_transform(small[1].astype(float))
    np.testing.assert_allclose(ours, theirs * np.sign((ours * theirs).sum(0)), atol=1e-10)
    clouds = np.repeat(np.eye(3, 10), 20, 0) + 0.1 * np.random.default_rng(0).normal(size=(60, 10))
    points = tsne(clouds)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(60, np.inf))
    np.testing.assert_array_equal(distances.argmin(1) // 20, np.arange(60) // 20)  # the nearest is of the same cloud
