"""Smoothing: probabilities from counts, with some mass moved from seen n-grams to unseen ones.

With c(h w) counts, c(h) their sum over w, t(h) the number of different words after h, n_i the number of n-grams seen i
times, and p' the model of the next lower order:

    mle                  c(h w) / c(h); zero for words not seen after h
    add_k                (c(h w) + k) / (c(h) + k V), V without <s>
    stupid_backoff       as mle, and 0.4 p' for words not seen after h: scores, which do not sum to one. An unseen h
                         costs no factor, as in ARPA files (in the paper it does)
    interpolated         l_n c(h w) / c(h) + (1 - l_n) p', with l_n by EM on held-out text
    witten_bell          (c(h w) + t(h) p') / (c(h) + t(h))
    absolute             (c(h w) - d) / c(h) + d t(h) / c(h) p', d = n_1 / (n_1 + 2 n_2)
    kneser_ney           as absolute, but lower orders count how many different words an n-gram follows
    modified_kneser_ney  as kneser_ney, with three discounts: for n-grams seen once, twice, and more often

The order below single words is the uniform distribution. All methods but add_k give a back-off model.

Sources: Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128; Heafield et al. 2013 (adjusted counts, ends of
sentences, unknown words), https://aclanthology.org/P13-2121; Brants et al. 2007 (stupid back-off),
https://aclanthology.org/D07-1090.
"""

import warnings
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llm_jax.classic.ngrams import counting
from llm_jax.classic.ngrams.counting import ABSENT, Counts
from llm_jax.classic.ngrams.ngram import AddKModel, BackoffModel, Model
from llm_jax.classic.text.sentences import BEGIN, UNKNOWN, Vocabulary

METHODS = (
    "mle",
    "add_k",
    "stupid_backoff",
    "interpolated",
    "witten_bell",
    "absolute",
    "kneser_ney",
    "modified_kneser_ney",
)
FALLBACK = (0.5, 1.0, 1.5)  # discounts if they cannot be estimated


def adjusted(counts: Counts) -> list[np.ndarray]:
    """Kneser-Ney's adjusted counts: below the highest order, how many different words an n-gram follows.

    N-grams that begin a sentence follow no word and keep their counts.
    """
    out, begins = [], counts.keys[0] == BEGIN
    for n in range(len(counts.keys) - 1):
        if n:
            begins = begins[counts.keys[n] // counts.size]
        follows = np.bincount(counts.suffixes[n + 1], minlength=len(counts.keys[n]))
        out.append(np.where(begins, counts.counts[n], follows))
    return [*out, counts.counts[-1]]


def discounts(counts: np.ndarray, modified: bool = True) -> tuple[float, ...]:
    """Discounts of n-grams seen once, twice, and more often.

    If a corpus lacks n-grams seen once, twice or three times, or a discount is negative or above the count, the result
    is `FALLBACK`, with a warning.
    """
    n1, n2, n3, n4 = (int(np.sum(counts == i)) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 and n2 else 0.0
    found: tuple[float, ...] = (y, y, y)
    if modified:
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3) if n1 and n2 and n3 else (0.0,) * 3
    if not all(0 < d <= i for i, d in enumerate(found, start=1)):
        warnings.warn(
            f"{n1}, {n2}, {n3}, {n4} n-grams seen 1, 2, 3, 4 times give no discounts; using {FALLBACK}", stacklevel=2
        )
        found = FALLBACK if modified else FALLBACK[:1] * 3
    return found


class _Order(NamedTuple):
    """N-grams of one order.

    Attributes:
      counts: count of every n-gram.
      history: index of every n-gram's history.
      total: c(h) by the index of h.
    """

    counts: np.ndarray
    history: np.ndarray
    total: np.ndarray


def _shares(method: str, now: _Order, backoff: float) -> tuple[np.ndarray, np.ndarray]:
    """(probability of every n-gram before p' is added, weight of p' by history)."""
    c, total = now.counts, np.maximum(now.total, 1e-300)
    if method in ("mle", "stupid_backoff"):
        left = 0.0 if method == "mle" else backoff
        return c / total[now.history], np.full(len(total), left)
    kinds = np.bincount(now.history, weights=c > 0, minlength=len(total))
    if method == "witten_bell":
        return c / (total + kinds)[now.history], kinds / (total + kinds)
    d = np.array([0.0, *discounts(c, method == "modified_kneser_ney")])[np.minimum(c, 3).astype(int)]
    return (c - d) / total[now.history], np.bincount(now.history, weights=d, minlength=len(total)) / total


def _weight(ratio: np.ndarray, lower: np.ndarray) -> float:
    """The best weight of `ratio` against `lower`, probabilities of the same held-out words, by EM."""
    possible = (ratio > 0) | (lower > 0)  # a word that both exclude does not depend on the weight
    ratio, lower, weight = ratio[possible], lower[possible], 0.5
    for _ in range(100):
        share = weight * ratio / np.maximum(weight * ratio + (1 - weight) * lower, 1e-300)
        before, weight = weight, float(share.mean()) if len(share) else 0.5
        if abs(before - weight) < 1e-9:
            break
    return weight


def estimate(
    counts: Counts,
    vocabulary: Vocabulary,
    method: str = "modified_kneser_ney",
    held_out: np.ndarray | None = None,
    closed: bool = False,
    k: float = 1.0,
    backoff: float = 0.4,
    progress: bool = False,
) -> Model:
    """Builds a model from counts.

    Args:
      counts: counts of all orders.
      vocabulary: words by number.
      method: one of `METHODS`; see the module.
      held_out: numbered sentences, from which `interpolated` estimates its weights.
      closed: whether every word is in the vocabulary, so that `<unk>` has probability 0.
      k: added to every count by `add_k`.
      backoff: factor of the lower order in `stupid_backoff`.
      progress: whether to show a progress bar.

    Raises:
      ValueError: for an unknown method, `interpolated` without held-out text, `k` or `backoff` out of range, or a
        closed vocabulary with unknown words.
    """
    if method not in METHODS:
        raise ValueError(f"smoothing={method!r} is not one of {', '.join(METHODS)}")
    if method == "interpolated" and (held_out is None or not len(held_out)):
        raise ValueError("smoothing=interpolated needs held-out text for its weights")
    if method == "add_k" and not 0 < k < float("inf"):
        raise ValueError(f"k={k} must be positive and finite; k of 0 is smoothing=mle")
    if method == "stupid_backoff" and not 0 < backoff <= 1:
        raise ValueError(f"backoff={backoff} must lie in (0, 1]")
    unknown = int(counts.counts[0][UNKNOWN]) + (0 if held_out is None else int(np.sum(held_out == UNKNOWN)))
    if closed and unknown:
        raise ValueError(f"the vocabulary is closed, but {unknown:,} words of the text are not in it")
    if method == "add_k":
        return AddKModel(vocabulary, counts.keys, counts.counts, k, closed)
    table = adjusted(counts) if method.endswith("kneser_ney") else counts.counts
    possible = np.ones(counts.size)
    possible[BEGIN] = 0.0
    possible[UNKNOWN] = 0.0 if closed else 1.0
    probs = possible / possible.sum()
    model = BackoffModel(vocabulary, [], [], [])
    for n, c in enumerate(tqdm(table, unit="order", disable=not progress, desc="estimating")):
        lower = probs[counts.suffixes[n]] if n else probs
        history = counts.keys[n] // counts.size if n else np.zeros(counts.size, np.int64)
        total = np.bincount(history, weights=c, minlength=len(counts.keys[n - 1]) if n else 1)
        now = _Order(c, history, total)
        if method == "interpolated":
            assert held_out is not None
            ratio = c / np.maximum(total, 1e-300)[history]
            weight = _weight(*_held_out(model, counts.keys[: n + 1], total, ratio, probs, held_out))
            seen, left = weight * ratio, np.full(len(total), 1 - weight)
        else:
            seen, left = _shares(method, now, backoff)
        left = np.where(total > 0, left, 1.0)  # nothing was seen after h: p' has all the weight
        mixed = method not in ("mle", "stupid_backoff")
        probs = seen + left[history] * lower if mixed else seen
        with np.errstate(divide="ignore"):
            model = BackoffModel(
                vocabulary,
                [*model.keys, counts.keys[n]],
                [*model.log_probs, np.log10(probs)],
                [*model.backoffs, np.log10(left)] if n else [],
            )
    return model


def _held_out(
    model: BackoffModel,
    keys: list[np.ndarray],
    total: np.ndarray,
    ratio: np.ndarray,
    uniform: np.ndarray,
    text: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(relative frequency, probability by the orders so far) of held-out words whose history was seen."""
    positions, n = counting.positions(keys, len(model.vocabulary), text), len(keys) - 1
    before = np.append(ABSENT, positions[n - 1][:-1]) if n else np.zeros(len(text), np.int64)
    here = (before >= 0) & (text != BEGIN)
    here[here] = total[before[here]] > 0
    lower = 10.0 ** model.log_prob(text)[here] if n else uniform[text[here]]
    seen = positions[n][here]
    return np.where(seen >= 0, ratio[seen], 0.0), lower
