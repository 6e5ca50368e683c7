"""Naive Bayes: Bayes' rule by hand, sums to one, files, and what is refused."""

import math

import numpy as np
import pytest
import scipy.sparse

from llm_jax.classic.ngrams import stored
from llm_jax.classic.text import naive_bayes
from llm_jax.classic.text.naive_bayes import KINDS, fit, log_probs, predict, scores

# documents of the terms (good, bad, film); the first three are of class 0
COUNTS = scipy.sparse.csr_matrix([[2, 0, 1], [1, 0, 0], [0, 1, 1], [0, 2, 1]])
LABELS = np.array([0, 0, 0, 1])
NEW = np.array([[1, 2, 0], [0, 0, 0]])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_multinomial_by_bayes_rule(alpha):
    model = fit(COUNTS, LABELS, 2, alpha=alpha)
    terms = np.array([[3, 1, 2], [0, 2, 1]]) + alpha
    p = terms / terms.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(model.weights_CV), p, rtol=1e-14)
    joint = [[w * np.prod(q**c) for w, q in zip((3 / 4, 1 / 4), p, strict=True)] for c in NEW]
    np.testing.assert_allclose(np.exp(scores(model, NEW)), joint, rtol=1e-14)
    want = np.array(joint) / np.sum(joint, 1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs(model, NEW)), want, rtol=1e-14)
    assert predict(model, NEW).tolist() == want.argmax(1).tolist()
    np.testing.assert_allclose(want[1], [3 / 4, 1 / 4])  # of an empty document only the prior is known


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_bernoulli_by_bayes_rule(alpha):
    model = fit(COUNTS, LABELS, 2, "bernoulli", alpha)
    p = (np.array([[2, 1, 2], [0, 1, 1]]) + alpha) / (np.array([[3], [1]]) + 2 * alpha)
    joint = np.array([[w * np.prod(np.where(c > 0, q, 1 - q)) for w, q in zip((3 / 4, 1 / 4), p, strict=True)]
                      for c in NEW])  # fmt: skip
    np.testing.assert_allclose(np.exp(log_probs(model, NEW)), joint / joint.sum(1, keepdims=True), rtol=1e-13)
    np.testing.assert_array_equal(scores(model, NEW), scores(model, NEW * 7.5))


def test_bernoulli_is_a_distribution_over_documents():
    """The probabilities of all sets of terms add up to one in every class."""
    model = fit(COUNTS, LABELS, 2, "bernoulli", priors="uniform")
    every = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    np.testing.assert_allclose(np.exp(scores(model, every)).sum(0), [0.5, 0.5], rtol=1e-14)


def test_complement_by_its_equations():
    model = fit(COUNTS, LABELS, 2, "complement")
    others = np.array([[0, 2, 1], [3, 1, 2]]) + 1.0  # of each class, what the other one holds
    logs = np.log(others / others.sum(1, keepdims=True))
    np.testing.assert_allclose(scores(model, NEW), -NEW @ logs.T, rtol=1e-14)
    normed = fit(COUNTS, LABELS, 2, "complement", norm=True)
    np.testing.assert_allclose(normed.weights_CV, logs / logs.sum(1, keepdims=True), rtol=1e-14)
    np.testing.assert_allclose(normed.weights_CV.sum(1), 1)


def test_complement_keeps_a_small_alpha():
    """Where only one class holds a term, nothing but alpha is left of it in the others."""
    counts = np.array([[0.1], [0.2], [0.0]]) + [0.0, 0.7]
    model = fit(counts, np.array([0, 0, 1]), 2, "complement", 1e-18)
    np.testing.assert_allclose(model.weights_CV[0, 0], -math.log(1e-18 / 0.7), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_to_one_for_sparse_and_dense(kind):
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3
    counts = rng.poisson(0.4 + 2.0 * (np.arange(30) % 3 == labels[:, None]))  # ten words a class come oftener in it
    model = fit(counts, labels, 3, kind, 0.3)
    got = log_probs(model, counts)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-12)
    sparse = scipy.sparse.csr_matrix(counts)
    np.testing.assert_allclose(log_probs(fit(sparse, labels, 3, kind, 0.3), sparse), got, rtol=1e-12)
    assert (predict(model, counts) == labels).mean() > 0.95 and got.shape == (40, 3)


def test_priors():
    shares = lambda priors: np.exp(log_probs(fit(COUNTS, LABELS, 2, priors=priors), np.zeros((1, 3)))[0])
    np.testing.assert_allclose(shares("uniform"), [0.5, 0.5])
    np.testing.assert_allclose(shares("fitted"), [0.75, 0.25])
    np.testing.assert_allclose(shares((0.1, 0.9)), [0.1, 0.9])


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, tmp_path):
    model = fit(COUNTS, LABELS, 2, kind)
    naive_bayes.save(model, tmp_path)
    again = naive_bayes.load(tmp_path)
    assert again.kind == kind
    np.testing.assert_array_equal(scores(again, NEW), scores(model, NEW))
    np.savez(tmp_path / "naive_bayes.npz", weights=model.weights_CV, bias=np.zeros(3))
    with pytest.raises(stored.StoredError, match=r"weights \(2, 3\) and biases \(3,\) is not a model"):
        naive_bayes.load(tmp_path)
    (tmp_path / "naive_bayes.npz").write_bytes(b"cut")
    with pytest.raises(stored.StoredError, match="naive_bayes.npz cannot be read"):
        naive_bayes.load(tmp_path)
    (tmp_path / "naive_bayes.json").unlink()
    with pytest.raises(stored.StoredError, match=r"holds no naive_bayes\.json"):
        naive_bayes.load(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "gaussian"}, "kind='gaussian' is not one of multinomial, complement, bernoulli"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"alpha": -1.0}, "alpha=-1.0 must be positive"),
        ({"alpha": math.inf}, "alpha=inf must be positive"),
        ({"alpha": math.nan}, "alpha=nan must be positive"),
        ({"norm": True}, "norm needs kind='complement'"),
        ({"kind": "complement", "priors": "uniform"}, "have no effect with kind='complement'"),
        ({"kind": "complement", "priors": [0.5, 0.5]}, "have no effect with kind='complement'"),
        ({"priors": "flat"}, "priors='flat' is neither fitted nor uniform"),
        ({"priors": [0.5, 0.6]}, "must be 2 positive numbers whose sum is one"),
        ({"priors": [0.0, 1.0]}, "must be 2 positive numbers"),
        ({"priors": [0.2, 0.3, 0.5]}, "must be 2 positive numbers"),
        ({"num_classes": 3}, "class 2 of 3 has no document"),
        ({"num_classes": 1}, "at least two classes"),
        ({"labels_N": np.array([0, 1, 2, 1])}, "label 2 is not one of 0 to 1"),
        ({"labels_N": np.array([0, -1, 0, 1])}, "label -1 is not one of 0 to 1"),
        ({"labels_N": np.array([0, 1])}, r"labels of shape \(2,\)"),
        ({"labels_N": np.array([0, 0, 1, 1.0])}, "type float64"),
        ({"counts_NV": np.zeros((0, 3)), "labels_N": np.zeros(0, int)}, "no document"),
        ({"counts_NV": -COUNTS}, "numbers below zero"),
        ({"counts_NV": np.full((4, 3), np.nan)}, "no numbers"),
    ],
)
def test_errors_of_fitting(change, words):
    with pytest.raises(naive_bayes.NaiveBayesError, match=words):
        fit(**{"counts_NV": COUNTS, "labels_N": LABELS, "num_classes": 2} | change)


def test_errors_of_using():
    model = fit(COUNTS, LABELS, 2)
    with pytest.raises(naive_bayes.NaiveBayesError, match="counts of 2 terms, but the classifier was fitted to 3"):
        predict(model, np.zeros((1, 2)))
    with pytest.raises(naive_bayes.NaiveBayesError, match="numbers below zero"):
        log_probs(model, -NEW)
