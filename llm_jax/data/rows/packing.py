"""Rows of fixed length from documents: a contiguous stream, or whole documents side by side.

Both are random-access sources: row i is computed from the memory-mapped tokens, nothing is copied up front.
"""

import logging
from typing import SupportsIndex

import numpy as np

from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.source import Row
from llm_jax.data.tokens import TokenStore

log = logging.getLogger(__name__)


class StreamRows:
    """Row i holds tokens `[i*T, i*T + T]`, T + 1 of them, cut wherever it falls; no token is lost or padded.

    Attributes:
      store: tokenized documents.
      length: T, tokens predicted a row.
      segments: adds `segment_ids` from 1, so that attention and labels do not cross documents.
    """

    def __init__(self, store: TokenStore, length: int, segments: bool = False) -> None:
        """Raises CorpusError where there are not T + 1 tokens."""
        self.store, self.length, self.segments = store, length, segments
        self.count = (len(store.ids) - 1) // length
        if self.count < 1:
            raise CorpusError(
                f"{len(store.ids)} tokens are too few for one row of {length} + 1: "
                "use more text or a smaller training.sequence_length"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Row:
        """`input_ids` [T + 1] int32 and, as asked for, `segment_ids` and `loss_weights`."""
        start = int(index) * self.length
        cut = slice(start, start + self.length + 1)
        row: Row = {"input_ids": np.asarray(self.store.ids[cut], np.int32)}
        if self.segments:
            where = np.arange(start, start + self.length + 1)
            document = np.searchsorted(self.store.starts, where, side="right")
            row["segment_ids"] = (document - document[0] + 1).astype(np.int32)
        if self.store.weights is not None:
            row["loss_weights"] = np.asarray(self.store.weights[cut], np.float32)
        return row


class PlainRows:
    """Row i holds tokens `[i*T, i*T + T)`: for objectives that shift nothing."""

    def __init__(self, store: TokenStore, length: int) -> None:
        """Raises CorpusError where there are not T tokens."""
        self.store, self.length, self.count = store, length, len(store.ids) // length
        if self.count < 1:
            raise CorpusError(
                f"{len(store.ids)} tokens are too few for one row of {length}: "
                "use more text or a smaller training.sequence_length"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Row:
        """`input_ids` [T] int32."""
        start = int(index) * self.length
        return {"input_ids": np.asarray(self.store.ids[start : start + self.length], np.int32)}


class WholeRows:
    """Rows of whole documents, each a segment, the rest padding of weight 0; documents longer than a row are cut.

    Consecutive documents share a row while they fit (next fit), so the order of the corpus is kept.

    Attributes:
      truncated: documents that were cut.
      cut_tokens: tokens that this took from them.
      dropped: documents of fewer than two tokens, which predict nothing.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        """Raises CorpusError where there is no document of two tokens; one line says what was cut or left out."""
        self.store, self.length, self.size = store, length, length + 1
        rows: list[list[int]] = []
        room = 0
        sizes = np.diff(store.starts)
        over = np.maximum(sizes - self.size, 0)
        self.truncated, self.cut_tokens = int((over > 0).sum()), int(over.sum())
        self.dropped = int((sizes < 2).sum())
        for document, n in enumerate(sizes):
            if n < 2:
                continue
            n = min(int(n), self.size)
            if n > room:
                rows.append([])
                room = self.size
            rows[-1].append(document)
            room -= n
        if not rows:
            raise CorpusError("no document of at least two tokens")
        self.rows = rows
        if self.truncated:
            said = "%d of %d documents are longer than a row of %d + 1 tokens and are cut: "
            said += "%d tokens, %.1f %% of all, are lost"
            share = 100 * self.cut_tokens / len(store.ids)
            log.warning(said, self.truncated, len(sizes), length, self.cut_tokens, share)
        if self.dropped:
            log.info("%d of %d documents have fewer than two tokens and are left out", self.dropped, len(sizes))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """`input_ids`, `segment_ids` (0 = padding) and `loss_weights`, `[T + 1]` each."""
        ids, segments = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)
        weights, at = np.zeros(self.size, np.float32), 0
        for number, document in enumerate(self.rows[int(index)], 1):
            start, end = self.store.starts[document : document + 2]
            n = min(int(end - start), self.size)
            cut, here = slice(start, start + n), slice(at, at + n)
            ids[here], segments[here] = self.store.ids[cut], number
            weights[here] = 1 if self.store.weights is None else self.store.weights[cut]
            at += n
        return {"input_ids": ids, "segment_ids": segments, "loss_weights": weights}
