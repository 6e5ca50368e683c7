"""Words of texts as rows of an embedding table: 0 is padding, 1 any unknown word."""

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from llm_jax.classic.terms import TOKENIZERS

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
            raise WordsError(f"tokenize={tokenize!r} is none of {', '.join(TOKENIZERS)}")
        self.tokenize, known = tokenize, dict.fromkeys(w for w in words if w not in SPECIAL)
        if not known:
            raise WordsError("a vocabulary of no word: the texts hold none, or none often enough (min_count)")
        self.words = [*SPECIAL, *known]
        self.index = {w: i for i, w in enumerate(known, len(SPECIAL))}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, int]:
        """(rows of the words, padded behind, int32 `[N, length]`; how many texts were cut to that length)."""
        cut, ids = 0, np.full((len(texts), length), PAD, np.int32)
        for row, text in zip(ids, texts, strict=True):
            found = TOKENIZERS[self.tokenize](text)
            cut += len(found) > length
            kept = [self.index.get(w, UNKNOWN) for w in found[:length]]
            row[: len(kept)] = kept
        return ids, cut


def count(texts: Sequence[str], tokenize: str) -> tuple[collections.Counter[str], int]:
    """(how often each word stands in texts, words of the longest)."""
    split = [TOKENIZERS[tokenize](text) for text in texts]
    return collections.Counter(itertools.chain.from_iterable(split)), max(map(len, split), default=0)
