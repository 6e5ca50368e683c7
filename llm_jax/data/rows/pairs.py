"""Pairs of texts, a source and its target: translations, questions and answers."""

import logging
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np

from llm_jax.data.corpora import BadRows, CorpusError, Document
from llm_jax.data.rows.source import Row
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.data.tokens import Encode, EncodedDocument, TokenStore

log = logging.getLogger(__name__)
IGNORED = -100  # a label that does not count


def both(document: Document, fields: tuple[str, ...]) -> tuple[str, str] | None:
    """(source, target) of a record, None where one is missing."""
    source, target = ((document.record or {}).get(f) for f in fields)
    return (source, target) if isinstance(source, str) and isinstance(target, str) and source and target else None


def encode_pairs(tokenizer: Tokenizer, fields: tuple[str, ...]) -> Encode:
    """Encodes records: the source with weight 0, the target with weight 1, each as `encode_source` gives it."""

    def encode(batch: Sequence[Document], bad: BadRows) -> Iterator[EncodedDocument]:
        usable = []
        for document in batch:
            pair = both(document, fields)
            if pair is None:
                bad.add(document.name, f"no texts in {' and '.join(fields)}")
            else:
                usable.append(pair)
        sides = (tokenizer, tokenizer.target)
        sources, targets = (side.encode_sources([p[i] for p in usable]) for i, side in enumerate(sides))
        for a, b in zip(sources, targets, strict=True):
            yield EncodedDocument([*a, *b], [0] * len(a) + [1] * len(b))

    return encode


class PairedRows:
    """Row i holds a source, padded, and the labels of its target; pairs longer than a row are left out.

    Attributes:
      store: encoded by `encode_pairs`.
      length: tokens of source and of target at most, their ends included.
      dropped: pairs left out.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        """Prepares the pairs; raises CorpusError if none fits."""
        self.store, self.length = store, length
        if store.weights is None:
            raise CorpusError("the corpus holds no pairs: set data.fields to the names of source and target")
        sizes = np.diff(store.starts)
        targets = np.diff(np.concatenate([[0], np.cumsum(store.weights, dtype=np.int64)])[store.starts])
        fits = np.maximum(sizes - targets, targets) <= length
        self.cuts = [
            (int(begin), int(begin + size - target), int(begin + size))
            for begin, size, target, ok in zip(store.starts[:-1], sizes, targets, fits, strict=True)
            if ok
        ]
        self.dropped = len(sizes) - len(self.cuts)
        if not self.cuts:
            raise CorpusError(f"no pair has at most {length} tokens a side: raise training.sequence_length")
        if self.dropped:
            log.info("%d of %d pairs are longer than %d tokens and left out", self.dropped, len(sizes), length)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.cuts)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """`input_ids`, `attention_mask` and `labels`, `[length]` int32 each."""
        begin, middle, end = self.cuts[int(index)]
        ids, mask = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32)
        labels = np.full(self.length, IGNORED, np.int32)
        ids[: middle - begin], mask[: middle - begin] = self.store.ids[begin:middle], 1
        labels[: end - middle] = self.store.ids[middle:end]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
