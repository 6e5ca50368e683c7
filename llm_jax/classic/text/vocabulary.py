"""Words of texts as rows of an embedding table: 0 is padding, 1 any unknown word."""

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jax.classic.text.document_terms import TOKENIZERS

PAD, UNKNOWN = 0, 1
SPECIAL = ("<pad>", "<unk>")  # which no tokenizer's word is taken for


class WordsError(ValueError):
    """Texts without words; one line that says why."""


class Words:
    """A vocabulary.

    Attributes:
      words: by row, the special ones first.
      tokenize: name of the function that cuts texts, one of `TOKENIZERS`.
      index: rows by word, without the special ones.
    """

    def __init__(self, words: Iterable[str], tokenize: str) -> None:
        """Words without the special ones; those that stand twice are taken once.

        Raises:
          WordsError: for no word, or an unknown tokenizer.
        """
        if tokenize not in TOKENIZERS:
            raise WordsError(f"tokenize={tokenize!r} is not one of {', '.join(TOKENIZERS)}")
        self.tokenize, distinct = tokenize, dict.fromkeys(w for w in words if w not in SPECIAL)
        if not distinct:
            raise WordsError("a vocabulary of no word: the texts hold none, or none often enough (min_count)")
        self.words = [*SPECIAL, *distinct]
        self.index = {w: i for i, w in enumerate(distinct, len(SPECIAL))}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str], limit: int) -> tuple[np.ndarray, int]:
        """Texts as rows.

        Args:
          texts: N of them.
          limit: words of a text at most; of longer ones the beginning is taken.

        Returns:
          Rows of the words, padded behind to the longest text, int32 `[N, T]` with T from 1; how many texts were cut.
        """
        split = [TOKENIZERS[self.tokenize](text) for text in texts]
        longest = max(map(len, split), default=0)
        ids = np.full((len(texts), max(1, min(longest, limit))), PAD, np.int32)
        for row, found in zip(ids, split, strict=True):
            rows = [self.index.get(w, UNKNOWN) for w in found[:limit]]
            row[: len(rows)] = rows
        return ids, sum(len(found) > limit for found in split)


def count(texts: Iterable[str], tokenize: str) -> collections.Counter[str]:
    """Counts every word of the texts."""
    return collections.Counter(itertools.chain.from_iterable(map(TOKENIZERS[tokenize], texts)))
