"""A back-off model as hash tables, for texts longer than the model: 2 to 5 times as fast as searching sorted arrays.

The hash of an n-gram is a polynomial of 64-bit numbers drawn for its words, modulo 2**64: the windows of one length
that end at each word of a text take a multiplication and an addition, and no order waits for the one before. The
longest n-grams are looked up first. Words where none was seen, and those before them, are then looked up from pairs
upwards, longer ones only where what stands before was seen: a model that holds `a b c` holds `a b`.

A table of an order is open addressed with linear probing, at most half full, its keys ascending, so that a walk ends at
the first key above. A row holds key, log probability and back-off: a look-up is one line of memory. Texts go through in
blocks that fit the cache. Only hashes are compared, as in KenLM: a word in a model of a billion n-grams is mistaken
with a probability of some 2e-10.

Compiled by XLA for a CPU the same look-ups were slower than in numpy, in one function or one for each step.

Sources: Heafield 2011, "KenLM", https://aclanthology.org/W11-2123 (probing); Amble and Knuth 1974, "Ordered hash
tables", https://doi.org/10.1093/comjnl/17.2.135.
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from llm_jax.classic.ngrams.ngram import BackoffModel, Model
from llm_jax.classic.text.numbering import BASE, SPREAD
from llm_jax.classic.text.sentences import BEGIN

PIECE = 1 << 20  # words between two steps of a bar
BLOCK = 1 << 15  # words that are looked up at once
FREE = np.uint64(2**64 - 1)  # the key of slots that hold nothing
NOWHERE = np.uint64(1)  # the hash of windows that cross sentences


class _Order:
    """The table of one order.

    Attributes:
      rows: uint64 `[slots * width]`, of each slot the key (`FREE` where there is none) and the bits of its values.
    """

    def __init__(self, hashes: np.ndarray, values: list[np.ndarray]) -> None:
        bits = max((2 * len(hashes)).bit_length(), 2)
        self.shift, self.width = np.uint64(64 - bits), 1 + len(values)
        keys = hashes * SPREAD
        order = np.argsort(keys)
        keys = keys[order]
        rank = np.arange(len(keys))
        taken = np.maximum.accumulate((keys >> self.shift).view(np.int64) - rank) + rank  # its slot, or the next free
        size = max(1 << bits, int(taken[-1]) + 1 if len(taken) else 0) + 1  # the last one is free: every walk ends
        rows = np.full((size, self.width), FREE)
        rows[taken, 0] = keys
        for i, x in enumerate(values, start=1):
            rows[taken, i] = x[order].astype(np.float64).view(np.uint64)
        self.rows = rows.reshape(-1)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions of those hashes that are there, the begins of their rows)."""
        keys = hashes * SPREAD
        at = (keys >> self.shift).view(np.int64)
        at *= self.width
        got = self.rows.take(at)
        there = got == keys
        walk = np.flatnonzero(got < keys)  # keys ascend from slot to slot
        while len(walk):
            to, wanted = at.take(walk) + self.width, keys.take(walk)
            got = self.rows.take(to)
            at[walk], there[walk] = to, got == wanted
            walk = walk.take(np.flatnonzero(got < wanted))
        found = np.flatnonzero(there)
        return found, at.take(found)

    def value(self, rows: np.ndarray, column: int) -> np.ndarray:
        return self.rows.take(rows + column).view(np.float64)


class HashedModel:
    """Scores as the model does of which it holds a copy; of some 50 bytes an n-gram."""

    def __init__(self, model: BackoffModel, seed: int = 0) -> None:
        """Builds the tables.

        Args:
          model: stays as it is.
          seed: of the words' numbers.
        """
        size = len(model.vocabulary)
        self.words = np.random.default_rng(seed).integers(1, 2**64 - 1, size, np.uint64)
        self.log_probs = np.asarray(model.log_probs[0], np.float64)
        self.backoffs = np.asarray(model.backoffs[0], np.float64) if model.order > 1 else np.zeros(size)
        self.orders: list[_Order] = []
        hashes = self.words
        for n in range(1, model.order):
            before, word = np.divmod(model.keys[n], size)
            hashes = hashes[before] * BASE + self.words[word]
            self.orders.append(_Order(hashes, [model.log_probs[n], *model.backoffs[n : n + 1]]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        tables = sum(table.rows.nbytes for table in self.orders)
        return self.words.nbytes + self.log_probs.nbytes + self.backoffs.nbytes + tables

    def log_prob(self, text: np.ndarray, block: int = BLOCK) -> np.ndarray:
        """See `ngram.Model`; about `block` words are looked up at once."""
        out = np.empty(len(text))
        for begin, end in blocks(text, block):
            out[begin:end] = self._block(text[begin:end])
        return out

    def _block(self, text: np.ndarray) -> np.ndarray:
        begins = np.flatnonzero(text == BEGIN)
        hashes = [self.words.take(text)]
        for _ in self.orders:
            longer = hashes[0].copy()
            longer[1:] += hashes[-1][:-1] * BASE
            longer[begins] = NOWHERE
            hashes.append(longer)
        out, left = np.zeros(len(text)), np.ones(len(text), bool)  # where the longest n-gram was not seen
        left[begins] = False
        if self.orders:
            at, rows = self.orders[-1].find(hashes[-1])
            out[at] = self.orders[-1].value(rows, 1)
            left[at] = False
        at = np.flatnonzero(left)
        out[at] = self.log_probs.take(text.take(at)) + self.backoffs.take(text.take(at - 1))
        near = left.copy()  # and the words before, whose n-grams are histories
        near[:-1] |= left[1:]
        asked = near
        for n, table in enumerate(self.orders[:-1], start=1):
            at = np.flatnonzero(asked)
            which, rows = table.find(hashes[n].take(at))
            at = at.take(which)
            seen, pays = np.zeros(len(text) + 1, bool), np.zeros(len(text) + 1)  # by the word after
            seen[at + 1], pays[at + 1] = True, table.value(rows, 2)
            words = np.flatnonzero(left.take(at))
            out[at.take(words)] = table.value(rows.take(words), 1)
            out += np.where(left, pays[:-1], 0.0)
            asked = near & seen[:-1]
            asked[1:] |= near[1:] & ~near[:-1]  # nobody asked for what stands before
        return out


def score(model: Model, text: np.ndarray, progress: bool = False) -> np.ndarray:
    """`model.log_prob(text)`, by tables if the text is longer than the model: they take about as long to make.

    Args:
      model: of any kind.
      text: numbered sentences, `[T]`.
      progress: shows a bar.
    """
    scorer: Model | HashedModel = model
    if isinstance(model, BackoffModel) and len(text) > sum(map(len, model.keys)):
        scorer = HashedModel(model)
    out = np.empty(len(text))
    with tqdm(total=len(text), unit="word", unit_scale=True, disable=not progress, desc="scoring") as bar:
        for begin, end in blocks(text, PIECE):
            out[begin:end] = scorer.log_prob(text[begin:end])
            bar.update(end - begin)
    return out


def blocks(text: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Begins and ends of pieces of whole sentences, of about so many words."""
    begins = np.flatnonzero(text == BEGIN)
    at = np.searchsorted(begins, np.arange(size, len(text), size))
    cuts = np.unique([0, *begins[at[at < len(begins)]], len(text)]).tolist()
    yield from zip(cuts, cuts[1:], strict=False)
