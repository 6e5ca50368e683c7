"""N-gram language models: sorted arrays, searched for many words at once.

A back-off model is a table: `log p(w | h)` is stored where `h w` was seen, and else is `log backoff(h) + log p(w | h
without its first word)`, where a history that was not seen pays nothing. All smoothing is in the tables (`smoothing`),
all logarithms are to the base of ten, as in ARPA files.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.classic.ngrams import counting
from llm_jax.classic.ngrams.counting import ABSENT
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN, Vocabulary


@dataclasses.dataclass(frozen=True)
class Model(abc.ABC):
    """What says how probable a word is after the n - 1 before it.

    Attributes:
      vocabulary: of V words.
      keys: n sorted arrays (see `counting`).
    """

    vocabulary: Vocabulary
    keys: list[np.ndarray]

    @property
    def order(self) -> int:
        """Number of words in the longest n-grams."""
        return len(self.keys)

    @abc.abstractmethod
    def log_prob(self, text: np.ndarray) -> np.ndarray:
        """`log10 p` of every word after those before it in its sentence, `[T]`; 0 for `<s>`.

        Args:
          text: numbered sentences, each with both ends, one after the other.
        """

    @abc.abstractmethod
    def next(self, words: Sequence[int]) -> np.ndarray:
        """Probabilities of what follows numbered words (begin with `BEGIN`), `[V]`; that of `<s>` is 0."""

    def sample(self, rng: np.random.Generator, words: Sequence[int] = (BEGIN,), max_words: int = 100) -> list[int]:
        """Words drawn after given ones up to the end of the sentence, none of them unknown.

        Raises:
          ValueError: where nothing can follow.
        """
        out = list(words)
        while len(out) < len(words) + max_words:
            p = self.next(out)
            p[UNKNOWN] = 0.0
            if not p.sum() > 0:
                said = " ".join(self.vocabulary.words[w] for w in out[-self.order + 1 :])
                raise ValueError(f"nothing but unknown words can follow {said!r}")
            word = int(rng.choice(len(p), p=p / p.sum()))
            if word == END:
                break
            out.append(word)
        return out[len(words) :]


@dataclasses.dataclass(frozen=True)
class BackoffModel(Model):
    """The table.

    Attributes:
      log_probs: of every n-gram, base 10, by order; minus infinity where it cannot be.
      backoffs: of every n-gram of all orders but the last, base 10.
    """

    log_probs: list[np.ndarray]
    backoffs: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in (*self.keys, *self.log_probs, *self.backoffs))

    def log_prob(self, text: np.ndarray) -> np.ndarray:
        """See `Model`."""
        positions = counting.positions(self.keys, len(self.vocabulary), text)
        out = self.log_probs[0][positions[0]].astype(np.float64)
        for n in range(1, self.order):  # the longest that was seen, or what its history pays for one word less
            seen, before = positions[n] >= 0, np.append(ABSENT, positions[n - 1][:-1])
            pays = (before >= 0) & ~seen & (text != BEGIN)
            out[pays] += self.backoffs[n - 1][before[pays]]
            out[seen] = self.log_probs[n][positions[n][seen]]
        return np.where(text == BEGIN, 0.0, out)

    def next(self, words: Sequence[int]) -> np.ndarray:
        """See `Model`."""
        size = len(self.vocabulary)
        out = 10.0 ** self.log_probs[0].astype(np.float64)
        for n, place in enumerate(counting.history(self.keys, size, words)[1:], start=1):
            if place == ABSENT:
                continue
            out *= 10.0 ** np.float64(self.backoffs[n - 1][place])
            first, last = np.searchsorted(self.keys[n], [place * size, (place + 1) * size])
            out[self.keys[n][first:last] - place * size] = 10.0 ** self.log_probs[n][first:last].astype(np.float64)
        out[BEGIN] = 0.0
        return out


@dataclasses.dataclass(frozen=True)
class AddKModel(Model):
    """`(c(h w) + k) / (c(h) + k V')` of the n - 1 words before, V' words that can be: no table of back-offs says that.

    Attributes:
      counts: of every n-gram, by order.
      k: what every word has been seen more.
      closed: nothing is ever unknown.
    """

    counts: list[np.ndarray]
    k: float
    closed: bool = False

    def _totals(self, n: int) -> np.ndarray:
        """c(h) of all histories of n words."""
        if n == 0:
            return self.counts[0].sum()[None]
        return np.bincount(self.keys[n] // len(self.vocabulary), self.counts[n], len(self.keys[n - 1]))

    def log_prob(self, text: np.ndarray) -> np.ndarray:
        """See `Model`."""
        size = len(self.vocabulary)
        positions = counting.positions(self.keys, size, text)
        since = np.arange(len(text)) - np.maximum.accumulate(np.where(text == BEGIN, np.arange(len(text)), 0))
        out, more = np.zeros(len(text)), self._more()
        for n in range(self.order):  # words at which the history has n
            here = (since == n) if n < self.order - 1 else (since >= n)
            here &= text != BEGIN
            before = np.append(ABSENT, positions[n - 1][:-1])[here] if n else np.zeros(here.sum(), np.int64)
            often, total = counting.take(self.counts[n], positions[n][here]), counting.take(self._totals(n), before)
            with np.errstate(divide="ignore"):
                out[here] = np.log10((often + more[text[here]]) / (total + more.sum()))
        return out

    def _more(self) -> np.ndarray:
        """What is added to the counts of all words, `[V]`."""
        every = np.full(len(self.vocabulary), self.k)
        every[[BEGIN, UNKNOWN] if self.closed else [BEGIN]] = 0.0
        return every

    def next(self, words: Sequence[int]) -> np.ndarray:
        """See `Model`."""
        size, n = len(self.vocabulary), min(len(words), self.order - 1)
        found = counting.history(self.keys, size, words)
        often = np.zeros(size)
        if n == 0:
            often = self.counts[0].astype(np.float64)
        elif found[n] != ABSENT:
            first, last = np.searchsorted(self.keys[n], [found[n] * size, (found[n] + 1) * size])
            often[self.keys[n][first:last] - found[n] * size] = self.counts[n][first:last]
        more = self._more()
        return (often + more) / (often.sum() + more.sum())
