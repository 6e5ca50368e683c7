"""A text's last sentences as held-out text, in which words that only they hold are unknown."""

import numpy as np

from llm_jax.classic.text.sentences import BEGIN, SPECIAL, UNKNOWN, Vocabulary


def known_before(
    vocabulary: Vocabulary, text: np.ndarray, cut: int, min_count: int = 1
) -> tuple[Vocabulary, np.ndarray]:
    """Words that stand before a place, and the whole text in their numbers.

    Args:
      vocabulary: of the text.
      text: numbered sentences, `[T]`.
      cut: the place.
      min_count: words rarer before it are unknown.

    Returns:
      The words, most frequent first, and the text, `[T]`.
    """
    counts = np.bincount(text[:cut], minlength=len(vocabulary))
    counts[: len(SPECIAL)] = 0
    frequent = np.argsort(-counts, kind="stable")
    frequent = frequent[counts[frequent] >= max(min_count, 1)]
    new = np.arange(len(vocabulary), dtype=text.dtype)
    new[len(SPECIAL) :] = UNKNOWN
    new[frequent] = np.arange(len(frequent)) + len(SPECIAL)
    return Vocabulary(vocabulary.words[i] for i in frequent), new[text]


def last_tenth(text: np.ndarray) -> tuple[int, int]:
    """(where the last tenth of the sentences begins, how many they are).

    Raises:
      ValueError: for fewer than ten sentences.
    """
    begins = np.flatnonzero(text == BEGIN)
    if len(begins) < 10:
        raise ValueError("fewer than ten sentences leave none for --smoothing=interpolated: set --held_out")
    first = len(begins) * 9 // 10
    return int(begins[first]), len(begins) - first
