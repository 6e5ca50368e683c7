"""Naive Bayes classifiers of documents that are counts or tf-idf: multinomial, complement, Bernoulli.

All three are linear: a document's score of a class is a sum of its terms' weights and a bias, and what differs is how
weights come from the counts. c(k, t) is the sum of term t over the documents of class k, a is `alpha`.

  multinomial  log (c(k, t) + a) / (c(k, .) + a V), and the log prior of k
  complement   -log of the same ratio over the documents of all other classes; no prior. With `norm` its logarithms are
               divided by their sum (weight-normalised complement naive Bayes)
  bernoulli    p(k, t) = (documents of k that hold t + a) / (documents of k + 2 a): log p where the document holds t,
               log 1 - p where it does not

Source: McCallum and Nigam 1998, "A comparison of event models for naive Bayes text classification"; Rennie et al. 2003,
"Tackling the poor assumptions of naive Bayes text classifiers". Formulas are scikit-learn's.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import scipy.sparse
import scipy.special
from etils import epath

from llm_jax.classic.ngrams.stored import StoredError
from llm_jax.classic.text import model_folder

KINDS = ("multinomial", "complement", "bernoulli")
Counts: TypeAlias = "scipy.sparse.csr_matrix | np.ndarray"


class NaiveBayesError(ValueError):
    """Counts, labels or options that make no classifier; one line that says why."""


@dataclasses.dataclass(frozen=True)
class NaiveBayes:
    """A classifier.

    Attributes:
      kind: one of `KINDS`.
      weights_CV: of every term in every class.
      bias_C: of every class.
    """

    kind: str
    weights_CV: np.ndarray
    bias_C: np.ndarray


def _checked(counts_NV: Counts, num_terms: int | None = None) -> scipy.sparse.csr_matrix:
    counts = scipy.sparse.csr_matrix(counts_NV)
    if not np.isfinite(counts.data).all() or (counts.data < 0).any():
        raise NaiveBayesError("counts hold numbers below zero, or no numbers: give counts or tf-idf")
    if num_terms is not None and counts.shape[1] != num_terms:
        raise NaiveBayesError(f"counts of {counts.shape[1]:,} terms, but the classifier was fitted to {num_terms:,}")
    return counts


def _one_hot(labels_N: np.ndarray, num_classes: int, num_documents: int) -> scipy.sparse.csr_matrix:
    """One-hot labels, `[C, N]`: 1 where document n has class c."""
    labels = np.asarray(labels_N)
    if labels.shape != (num_documents,) or labels.dtype.kind not in "iu":
        raise NaiveBayesError(
            f"labels of shape {labels.shape} and type {labels.dtype} for {num_documents} documents: "
            "give every document the number of its class"
        )
    if num_classes < 2:
        raise NaiveBayesError(f"num_classes={num_classes}: there must be at least two classes to choose from")
    if not len(labels):
        raise NaiveBayesError("no document")
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise NaiveBayesError(f"label {wrong} is not one of 0 to {num_classes - 1}")
    if len(empty := np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)):
        raise NaiveBayesError(f"class {empty[0]} of {num_classes} has no document: leave it out, or give it some")
    return scipy.sparse.csr_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))), (num_classes, len(labels)))


def _log_priors(priors: str | Sequence[float], sizes_C: np.ndarray) -> np.ndarray:
    if isinstance(priors, str):
        if priors not in ("fitted", "uniform"):
            raise NaiveBayesError(f"priors={priors!r} is neither fitted nor uniform, and no list of probabilities")
        sizes_C = sizes_C if priors == "fitted" else np.ones_like(sizes_C)
        return np.log(sizes_C / sizes_C.sum())
    given = np.asarray(priors, np.float64)
    if given.shape != sizes_C.shape or not (given > 0).all() or not math.isclose(given.sum(), 1.0, rel_tol=1e-6):
        raise NaiveBayesError(f"priors={priors} must be {len(sizes_C)} positive numbers whose sum is one")
    return np.log(given)


def fit(
    counts_NV: Counts,
    labels_N: np.ndarray,
    num_classes: int,
    kind: str = "multinomial",
    alpha: float = 1.0,
    priors: str | Sequence[float] = "fitted",
    norm: bool = False,
) -> NaiveBayes:
    """A classifier of labelled documents.

    Args:
      counts_NV: counts or tf-idf, sparse or dense; Bernoulli looks only at what is above zero.
      labels_N: classes, numbered from 0.
      num_classes: C.
      kind: one of `KINDS`.
      alpha: what every term has been seen more in every class.
      priors: probabilities of the classes: `fitted` to their shares of the documents, `uniform`, or `[C]` given.
        Complement has none, and takes only `fitted`.
      norm: of complement, see above.

    Raises:
      NaiveBayesError: for counts below zero, labels that do not fit, a class without documents, an `alpha` that is not
        positive, or options of another kind.
    """
    if kind not in KINDS:
        raise NaiveBayesError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise NaiveBayesError(f"alpha={alpha} must be positive: without it one unseen word rules out a class")
    if norm and kind != "complement":
        raise NaiveBayesError(f"norm needs kind='complement', not {kind!r}")
    if kind == "complement" and not (isinstance(priors, str) and priors == "fitted"):
        raise NaiveBayesError(f"priors={priors!r} have no effect with kind='complement', which has none")
    counts = _checked(counts_NV)
    one_hot = _one_hot(labels_N, num_classes, counts.shape[0])
    sizes_C = np.asarray(one_hot.sum(1)).ravel()
    log_priors = _log_priors(priors, sizes_C)
    if kind == "bernoulli":
        hold = (one_hot @ _held(counts)).toarray()
        p, rest = (x / (sizes_C + 2 * alpha)[:, None] for x in (hold + alpha, sizes_C[:, None] - hold + alpha))
        there, absent = np.log(p), np.where(p < 0.5, np.log1p(-p), np.log(rest))  # of many small p no digit is lost
        return NaiveBayes(kind, there - absent, log_priors + absent.sum(1))
    sums = (one_hot @ counts).toarray()
    if kind == "complement":
        sums = sums.sum(0) - sums  # before alpha is added, or a small one would be lost
    seen = sums + alpha
    logs = np.log(seen) - np.log(seen.sum(1, keepdims=True))
    if kind == "multinomial":
        return NaiveBayes(kind, logs, log_priors)
    return NaiveBayes(kind, logs / logs.sum(1, keepdims=True) if norm else -logs, np.zeros(num_classes))


def _held(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Binary counts: 1 where a document holds a term."""
    return (counts > 0).astype(np.float64)


def scores(model: NaiveBayes, counts_NV: Counts) -> np.ndarray:
    """Log p(document and class), `[N, C]`, up to a number that is the same for all classes; complement's are none.

    Raises:
      NaiveBayesError: for counts below zero, or of other terms.
    """
    counts = _checked(counts_NV, model.weights_CV.shape[1])
    return (_held(counts) if model.kind == "bernoulli" else counts) @ model.weights_CV.T + model.bias_C


def log_probs(model: NaiveBayes, counts_NV: Counts) -> np.ndarray:
    """Log p(class | document), `[N, C]`; complement's scores are made to sum to one likewise."""
    found = scores(model, counts_NV)
    return found - scipy.special.logsumexp(found, axis=1, keepdims=True)


def predict(model: NaiveBayes, counts_NV: Counts) -> np.ndarray:
    """The most probable class of every document, `[N]`; the first among equals."""
    return scores(model, counts_NV).argmax(1)


def save(model: NaiveBayes, path: epath.PathLike) -> None:
    """Writes `naive_bayes.json` and `naive_bayes.npz` into a folder."""
    model_folder.write(path, "naive_bayes", {"kind": model.kind}, weights=model.weights_CV, bias=model.bias_C)


def load(path: epath.PathLike) -> NaiveBayes:
    """Reads what `save` wrote.

    Raises:
      StoredError: for a folder that holds none, or whose files are damaged or do not fit together.
    """
    with model_folder.reading(path, "naive_bayes", "classifier") as (about, read):
        kind, arrays = about["kind"], read()
        weights, bias = arrays["weights"], arrays["bias"]
    if kind not in KINDS or weights.ndim != 2 or bias.shape != weights.shape[:1]:
        raise StoredError(f"{path}: kind {kind!r} with weights {weights.shape} and biases {bias.shape} is not a model")
    return NaiveBayes(kind, weights, bias)
