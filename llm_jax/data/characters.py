"""Words as rows of character ids, as ELMo reads them.

Source: the batcher of https://github.com/allenai/bilm-tf: UTF-8 bytes, cut to fit, with marks around.
"""

from collections.abc import Sequence

import numpy as np

BEGIN_SENTENCE, END_SENTENCE, BEGIN_WORD, END_WORD, PADDING = range(256, 261)
BEGIN, END = "<S>", "</S>"  # tokens that stand for the ends themselves


def character_ids(token: str, size: int = 50) -> np.ndarray:
    """`[size]` int32: the word's bytes between marks, padded, each plus 1."""
    ends = {BEGIN: [BEGIN_SENTENCE], END: [END_SENTENCE]}
    inside = ends.get(token) or list(token.encode("utf-8", "surrogatepass"))[: size - 2]
    row = [BEGIN_WORD, *inside, END_WORD]
    return np.asarray(row + [PADDING] * (size - len(row)), np.int32) + 1


def batch(sentences: Sequence[Sequence[str]], size: int = 50) -> np.ndarray:
    """`[B, T + 2, size]`: every sentence between its ends, rows of zeros behind shorter ones.

    Raises:
      ValueError: if there is no sentence.
    """
    if not sentences:
        raise ValueError("no sentence to make a batch of")
    longest = max(len(s) for s in sentences) + 2
    out = np.zeros((len(sentences), longest, size), np.int32)
    for row, sentence in enumerate(sentences):
        for i, token in enumerate((BEGIN, *sentence, END)):
            out[row, i] = character_ids(token, size)
    return out
