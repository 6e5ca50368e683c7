"""Tf-idf and naive Bayes against scikit-learn, on the standard library's documentation strings and lines."""

import pathlib
import sysconfig

import numpy as np
import pytest

from experiments.benchmark.ours import naive_bayes as benchmark
from llm_jax.classic.text import naive_bayes
from llm_jax.classic.text.tfidf import Options, TfIdf

text = pytest.importorskip("sklearn.feature_extraction.text", reason="parity needs scikit-learn")
bayes = pytest.importorskip("sklearn.naive_bayes", reason="parity needs scikit-learn")


@pytest.fixture(scope="module")
def corpus():
    """(training documents, their classes, others with unseen words and empty ones): paragraphs of three modules."""
    documents, labels = [], []
    for label, name in enumerate(("datetime", "tarfile", "argparse")):
        path = pathlib.Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        found = [p for p in path.read_text().split("\n\n") if p.strip()][:150]
        documents += found
        labels += [label] * len(found)
    documents += ["Café crème, naïve Ångström \t\t and  ℃ İstanbul ﬁn", "x", "a\n\nb c\u00a0d e\u0301"]
    labels += [0, 1, 2]
    order = np.random.default_rng(0).permutation(len(documents))
    documents, labels = [documents[i] for i in order], np.array(labels)[order]
    return documents[:-100], labels[:-100], [*documents[-100:], "", "zyzzyva Ünseen", "the"]


STOP = ("def", "of", "self", "the")  # in an order: it is part of a test's name


def theirs(options, kind=text.TfidfVectorizer):
    names = {"ngrams": "ngram_range", "tokenize": None, "norm": None, "stop_words": None, "accents": "strip_accents"}
    tfidf = ("use_idf", "smooth_idf", "sublinear_tf", "norm") if kind is text.CountVectorizer else ()
    given = {names.get(k, k): v for k, v in options.items() if names.get(k, k) is not None and k not in tfidf}
    if options.get("tokenize") == "blanks":
        given |= {"tokenizer": str.split, "token_pattern": None, "lowercase": False}
    if "norm" in options and kind is text.TfidfVectorizer:
        given["norm"] = None if options["norm"] == "none" else options["norm"]
    if "stop_words" in options:
        given["stop_words"] = sorted(options["stop_words"])
    return kind(**given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "l1"},
        {"norm": "none"},
        {"use_idf": False},
        {"smooth_idf": False},
        {"sublinear_tf": True},
        {"binary": True},
        {"binary": True, "sublinear_tf": True, "norm": "l1", "smooth_idf": False},
        {"ngrams": (1, 2)},
        {"ngrams": (2, 3), "sublinear_tf": True},
        {"ngrams": (1, 4), "min_df": 3},
        {"min_df": 2},
        {"min_df": 0.01, "max_df": 0.2},
        {"max_df": 20},
        {"min_df": 2, "max_df": 0.5, "ngrams": (1, 2), "norm": "none"},
        {"stop_words": STOP},
        {"stop_words": STOP, "ngrams": (1, 3)},
        {"tokenize": "blanks"},
        {"tokenize": "blanks", "ngrams": (1, 2), "use_idf": False, "norm": "l1"},
        {"accents": "unicode"},
        {"accents": "ascii", "ngrams": (1, 2)},
        {"tokenize": "blanks", "accents": "unicode"},
        {"token_pattern": r"[a-z]+|[^\w\s]"},
        {"token_pattern": r"(\w)\w+", "ngrams": (1, 2), "stop_words": ("d", "s"), "accents": "unicode"},
        {"token_pattern": r"\w*"},
        {"analyzer": "char"},
        {"analyzer": "char", "ngrams": (2, 4), "min_df": 2, "accents": "unicode"},
        {"analyzer": "char", "ngrams": (5, 5), "norm": "l1", "accents": "ascii"},
        {"analyzer": "char_wb"},
        {"analyzer": "char_wb", "ngrams": (1, 3), "sublinear_tf": True},
        {"analyzer": "char_wb", "ngrams": (3, 5), "max_df": 0.5, "accents": "unicode"},
        {"analyzer": "char_wb", "ngrams": (6, 7), "binary": True, "use_idf": False},
    ],
    ids=str,
)
def test_tfidf_and_counts(corpus, options):
    train, _, others = corpus
    other = theirs(options)
    want = other.fit_transform(train)
    stop_words = frozenset(options.get("stop_words", ()))
    model, got = TfIdf.fit_transform(train, Options(**{**options, "stop_words": stop_words}))
    assert model.terms == other.get_feature_names_out().tolist()
    np.testing.assert_array_equal(got.indptr, want.indptr)
    for ours, reference in ((got, want), (model.transform(others), other.transform(others))):
        np.testing.assert_allclose(ours.toarray(), reference.toarray(), rtol=1e-12, atol=1e-12)
    if options.get("use_idf", True):
        np.testing.assert_allclose(model.idf, other.idf_, rtol=1e-12)
    counter = theirs(options, text.CountVectorizer).fit(train)
    np.testing.assert_array_equal(model.counts(others).toarray(), counter.transform(others).toarray())


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
def test_max_features(corpus, ngrams):
    """Where the last that is kept is more frequent than the first that is not; scikit-learn leaves ties to a sort."""
    train = corpus[0]
    often = np.sort(text.CountVectorizer(ngram_range=ngrams).fit_transform(train).toarray().sum(0))[::-1]
    for limit in (np.flatnonzero(often[:-1] > often[1:]) + 1)[[0, 10, -1]].tolist():
        other = text.TfidfVectorizer(ngram_range=ngrams, max_features=limit)
        want = other.fit_transform(train)
        model, got = TfIdf.fit_transform(train, Options(ngrams=ngrams, max_features=limit))
        assert model.terms == other.get_feature_names_out().tolist() and len(model.terms) == limit
        np.testing.assert_allclose(got.toarray(), want.toarray(), rtol=1e-12, atol=1e-12)


COUNTS = Options(use_idf=False, norm="none")
NAMES = {"multinomial": "MultinomialNB", "complement": "ComplementNB", "bernoulli": "BernoulliNB"}


@pytest.mark.parametrize("features", [COUNTS, Options(), Options(ngrams=(1, 2))], ids=["counts", "tfidf", "pairs"])
@pytest.mark.parametrize("alpha", [1.0, 0.1, 2.0**-20, 30.0])  # scikit-learn's complement rounds 1e-6 away to 1e-8
@pytest.mark.parametrize(
    "kind, ours, reference",
    [
        ("multinomial", {}, {}),
        ("multinomial", {"priors": "uniform"}, {"fit_prior": False}),
        ("multinomial", {"priors": [0.2, 0.5, 0.3]}, {"class_prior": [0.2, 0.5, 0.3]}),
        ("complement", {}, {}),
        ("complement", {"norm": True}, {"norm": True}),
        ("bernoulli", {}, {}),
        ("bernoulli", {"priors": "uniform"}, {"fit_prior": False}),
        ("bernoulli", {"priors": [0.2, 0.5, 0.3]}, {"class_prior": [0.2, 0.5, 0.3]}),
    ],
)
def test_naive_bayes(corpus, features, alpha, kind, ours, reference):
    train, labels, others = corpus
    tfidf, counts = TfIdf.fit_transform(train, features)
    model = naive_bayes.fit(counts, labels, 3, kind, alpha, **ours)
    other = getattr(bayes, NAMES[kind])(alpha=alpha, **reference).fit(counts, labels)
    for x in (counts, tfidf.transform(others)):
        want = other.predict_joint_log_proba(x)
        np.testing.assert_allclose(naive_bayes.scores(model, x), want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(naive_bayes.log_probs(model, x), other.predict_log_proba(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(naive_bayes.predict(model, x), other.predict(x))


@pytest.mark.parametrize("ngrams", [1, 2])
def test_the_benchmark_measures_the_same_model(ngrams):
    spec = {"part": "predict", "ngrams": ngrams, "tiny": True}
    from experiments.benchmark.peers import sklearn as peer

    ours, theirs = benchmark.measure(spec), peer.measure(spec)
    assert ours["accuracy"] == theirs["accuracy"] > 0.6 and min(ours["value"], theirs["value"]) > 0
