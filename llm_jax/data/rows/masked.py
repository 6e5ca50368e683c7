"""Rows for masked language models: `[CLS] text [SEP]`, or two sentences, with what may be masked.

All are random-access sources, computed from the memory-mapped tokens and an index; padding and special tokens are never
maskable.

Sources: Devlin et al. 2019, appendix A.2 (pairs), https://arxiv.org/abs/1810.04805; Liu et al. 2019, section 4.2 (full
sentences), https://arxiv.org/abs/1907.11692; Lan et al. 2020, section 3.1 (order), https://arxiv.org/abs/1909.11942.
"""

import logging
from typing import NamedTuple, SupportsIndex

import numpy as np

from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.source import Row, RowSource
from llm_jax.data.tokenizers import Tokenizer, TokenizerError
from llm_jax.data.tokens import TokenStore

log = logging.getLogger(__name__)
PAIRS = ("next", "order")
SHORTEST = 8  # tokens of text in a pair


class Frames(NamedTuple):
    """Special tokens around a text, and what a tokenizer says of its entries.

    Attributes:
      cls_id: stands before a text.
      sep_id: stands behind every sentence.
      pad_id: fills the rest of a row.
      special: `[V]` bool, entries that are not text.
      starts: `[V]` bool, entries that begin a word.
    """

    cls_id: int
    sep_id: int
    pad_id: int
    special: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frames":
        """The special tokens of a tokenizer.

        Raises:
          TokenizerError: if it lacks one of the special tokens.
        """
        found = {name: tokenizer.role(name) for name in ("cls", "sep", "pad")}
        missing = [name for name, index in found.items() if index is None]
        if missing:
            raise TokenizerError(f"the tokenizer has no {', '.join(missing)} token, which masked models need")
        cls_id, sep_id, pad_id = (index for index in found.values() if index is not None)
        return cls(cls_id, sep_id, pad_id, tokenizer.is_special(), tokenizer.starts_word())

    def row(self, ids: list[int] | np.ndarray, length: int) -> Row:
        """Pads ids to a row and says which tokens may be masked and to which word each belongs."""
        out = np.full(length, self.pad_id, np.int32)
        out[: len(ids)] = ids
        real = np.arange(length) < len(ids)
        begins = self.starts[out] | ~real
        begins[0] = False  # so that words count from 0
        return {
            "input_ids": out,
            "attention_mask": real.astype(np.int32),
            "maskable": real & ~self.special[out],
            "words": np.cumsum(begins, dtype=np.int32),
        }


class FramedRows:
    """Full sentences across documents: row i holds `[CLS]`, the i-th `length - 2` tokens, and `[SEP]`.

    Attributes:
      store: tokenized documents, each ending in the separator.
      length: T.
      frames: special tokens.
    """

    def __init__(self, store: TokenStore, length: int, frames: Frames) -> None:
        """Raises CorpusError where there are too few tokens for a row."""
        self.store, self.length, self.frames = store, length, frames
        self.count = len(store.ids) // max(1, length - 2)
        if self.count < 1 or length < 3:
            raise CorpusError(f"{len(store.ids)} tokens are too few for one row of {length}, or rows too short")

    def __len__(self) -> int:
        """Number of rows."""
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Row:
        """See `Frames.row`."""
        size = self.length - 2
        text = self.store.ids[int(index) * size : (int(index) + 1) * size]
        return self.frames.row(np.concatenate([[self.frames.cls_id], text, [self.frames.sep_id]]), self.length)


class PairRows:
    """Pairs of sentences: `[CLS] a [SEP] b [SEP]`, cut from one document at a random place.

    With `next`, b is from another document in half of the rows (label 1); with `order`, a and b are swapped in half of
    them (label 1). "Sentence" is any stretch of text, as in BERT.

    Attributes:
      store: tokenized documents.
      length: T.
      frames: special tokens.
      kind: `next` or `order`.
      seed: of the draws, which depend on it and on the row's number.
    """

    def __init__(self, store: TokenStore, length: int, frames: Frames, kind: str, seed: int) -> None:
        """Raises CorpusError where no document is long enough, or `next` has one only."""
        self.store, self.length, self.frames, self.kind, self.seed = store, length, frames, kind, seed
        room = length - 3
        last = np.asarray(store.ids[np.maximum(store.starts[1:] - 1, 0)])
        sizes = np.maximum(np.diff(store.starts) - (last == frames.sep_id), 0)  # without the separator
        self.windows: list[tuple[int, int, int]] = []  # document, start, end
        for document, size in enumerate(sizes):
            begin = int(store.starts[document])
            cuts = range(begin, begin + int(size), max(room, 1))
            ends = [min(c + room, begin + int(size)) for c in cuts]
            self.windows += [(document, a, b) for a, b in zip(cuts, ends, strict=True) if b - a >= SHORTEST]
        documents = {w[0] for w in self.windows}
        if room < SHORTEST or not documents or (kind == "next" and len(documents) < 2):
            raise CorpusError(
                f"pairs={kind!r} needs rows of at least {SHORTEST + 3} tokens and "
                f"{'two documents' if kind == 'next' else 'a document'} of at least {SHORTEST}"
            )
        lost, total = int(sizes.sum()) - sum(end - begin for _, begin, end in self.windows), int(sizes.sum())
        if lost:
            share = 100 * lost / total
            log.info("%d tokens, %.1f %% of all, are left over in fewer than %d and left out", lost, share, SHORTEST)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.windows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """See `Frames.row`; also `token_type_ids` and `pair_labels`."""
        rng = np.random.default_rng((self.seed, int(index)))
        document, begin, end = self.windows[int(index)]
        cut = int(rng.integers(begin + (end - begin) // 4, end - (end - begin) // 4 + 1))
        a, b = self.store.ids[begin:cut], self.store.ids[cut:end]
        label = int(rng.integers(2))
        if label and self.kind == "order":
            a, b = b, a
        elif label:
            other = document
            while other == document:
                other, begin, end = self.windows[int(rng.integers(len(self.windows)))]
            b = self.store.ids[begin:end][: len(b)]
        f = self.frames
        first = [f.cls_id, *a, f.sep_id]
        row = f.row([*first, *b, f.sep_id], self.length)
        types = (np.arange(self.length) >= len(first)) & (row["attention_mask"] > 0)
        return {**row, "token_type_ids": types.astype(np.int32), "pair_labels": np.int32(label)}


class MaskCopies:
    """Static masking: every row `copies` times, each with a number that its mask is drawn from.

    Source: Liu et al. 2019, section 4.1: ten copies, so that each mask is seen 4 times in 40 epochs.
    """

    def __init__(self, rows: RowSource, copies: int) -> None:
        """Repeats every row `copies` times, each with a mask of its own."""
        self.rows, self.copies = rows, copies

    def __len__(self) -> int:
        """Number of rows, every copy counted."""
        return len(self.rows) * self.copies

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Row `index` with its `mask_seed`."""
        return {**self.rows[int(index) % len(self.rows)], "mask_seed": np.int32(int(index))}
