"""Log-probabilities and perplexity of text under an n-gram model."""

import dataclasses
from typing import Any

import numpy as np

from llm_jax.classic.ngrams import hashed
from llm_jax.classic.ngrams.ngram import Model
from llm_jax.classic.text.sentences import BEGIN, UNKNOWN


@dataclasses.dataclass(frozen=True)
class Scores:
    """Logarithms are to the base of ten; ends of sentences count as words of a perplexity.

    Attributes:
      log_probs: of every line, `[N]`; minus infinity where it cannot be.
      tokens: words of every line, `[N]`.
      unknown: unknown words of every line, `[N]`.
      perplexity: of all words and ends.
      perplexity_without_unknown: of the known words and ends.
      impossible: how many words and ends have no probability.
    """

    log_probs: np.ndarray
    tokens: np.ndarray
    unknown: np.ndarray
    perplexity: float
    perplexity_without_unknown: float
    impossible: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is infinite is None, since JSON has no infinity."""

        def finite(x: float) -> float | None:
            return float(x) if np.isfinite(x) else None

        lines = zip(self.log_probs, self.tokens, self.unknown, strict=True)
        return {
            "perplexity": finite(self.perplexity),
            "perplexity_without_unknown": finite(self.perplexity_without_unknown),
            "log10_probability": finite(self.log_probs.sum()),
            "sentences": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "unknown": int(self.unknown.sum()),
            "lines": [
                {"log10_probability": finite(p), "tokens": int(tokens), "unknown": int(unknown)}
                for p, tokens, unknown in lines
            ],
        }


def score_lines(model: Model, text: np.ndarray, progress: bool = False) -> Scores:
    """Scores numbered sentences.

    Args:
      model: of any kind.
      text: sentences with both ends, one after the other, `[T]`.
      progress: shows a bar.

    Raises:
      ValueError: for a text without a line.
    """
    begins = np.flatnonzero(text == BEGIN)
    if not len(begins):
        raise ValueError("no line")
    log_p = hashed.score(model, text, progress)
    totals = np.add.reduceat(log_p, begins)
    tokens = np.diff(np.append(begins, len(text))) - 2
    unknown = np.add.reduceat((text == UNKNOWN).astype(int), begins)
    words_and_ends = tokens.sum() + len(begins)
    of_known = log_p[(text != UNKNOWN) & (text != BEGIN)]
    perplexity, of_known_only = 10 ** (-totals.sum() / words_and_ends), 10 ** (-of_known.mean())
    return Scores(totals, tokens, unknown, float(perplexity), float(of_known_only), int(np.isneginf(log_p).sum()))


def sums_to_one(model: Model) -> bool:
    """Whether what follows the beginning of a sentence sums to one; stupid back-off's scores do not."""
    return abs(model.next([BEGIN]).sum() - 1) <= 1e-3


def most_probable(model: Model, words: list[str], top: int) -> list[tuple[str, float]]:
    """The most probable words after those of a sentence so far, with their probabilities, which are above 0."""
    p = model.next(model.vocabulary.encode(words)[:-1].tolist())
    best = np.argsort(-p, kind="stable")[:top]
    return [(model.vocabulary.words[i], float(p[i])) for i in best if p[i] > 0]
