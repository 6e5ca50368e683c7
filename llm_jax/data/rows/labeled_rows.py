"""Labelled examples as a model reads them: tokenized, cut, padded, with their labels at the right places.

What does not fit a row is cut: of two texts the longer loses its end first, of a question and its context the context.
Of a tagged word the first piece carries the label; its others and the special tokens do not count.

Source: Devlin et al. 2019, sections 4 and 5.3, https://arxiv.org/abs/1810.04805.
"""

import bisect
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from llm_jax.data import characters
from llm_jax.data.corpora import BadRows, CorpusError
from llm_jax.data.labeled import Example
from llm_jax.data.rows.pairs import IGNORED
from llm_jax.data.rows.source import Row
from llm_jax.data.tokenizers import Tokenizer, check_ids
from llm_jax.data.tokens import unigram_nats

log = logging.getLogger(__name__)
SPECIAL = 4  # special tokens that a tokenizer puts around a pair, at most
CHUNK = 1024  # examples tokenized at once


class Pieces(NamedTuple):
    """One encoded text or pair.

    Attributes:
      ids: `[n]` int32, or `[n, M]` characters.
      types: which of two texts, `[n]`.
      places: tokens: every word's first piece, None where it has none; span: the characters of the context (begin, end)
        of every piece, None for those of the question and special ones.
      cut: whether something did not fit.
    """

    ids: np.ndarray
    types: np.ndarray
    places: list[Any]
    cut: bool


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What a model reads of an example.

    Attributes:
      tokenizer: its ids; of ELMo only where it cuts words.
      kind: one of `FIELDS`.
      length: tokens of a row at most.
      max_characters: of a word, where the model reads characters between the ends of a sentence.
      types: the model reads which of two texts a token belongs to.
      left: padding stands in front.
      entries: rows of the model's table, which ids must not exceed; None where there is no table.
    """

    tokenizer: Tokenizer
    kind: str
    length: int
    max_characters: int | None = None
    types: bool = False
    left: bool = False
    entries: int | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Tokenizer, kind: str, length: int) -> "Encoder":
        """The encoder for a model's config."""
        types, left = getattr(model, "num_token_types", 0) > 1, getattr(model, "pads_left", False)
        spells = getattr(model, "max_characters", None)
        entries = None if spells is not None else getattr(model, "vocab_size", None)
        return cls(tokenizer, kind, length, spells, types, left, entries)

    def __call__(self, inputs: Sequence[tuple[str, ...]]) -> list[list[Pieces]]:
        """The pieces of every example, a list for each choice; empty where a question leaves its context no room.

        Raises:
          ValueError: on pairs where words are spelled, and ids that the model's table has no row for.
        """
        if self.max_characters is not None:
            if self.kind != "tokens" and any(len(x) > 1 for x in inputs):
                raise ValueError("a model that spells words reads one text at a time, no pairs")
            return [[self._spelled(x)] for x in inputs]
        if self.kind == "choice":
            pairs = [(text, choice) for text, *choices in inputs for choice in choices]
            flat = iter(self._encoded(pairs))
            return [list(itertools.islice(flat, len(x) - 1)) for x in inputs]
        if self.kind == "tokens":
            encoded = self._encoded([(" ".join(words),) for words in inputs])
            return [[p._replace(places=_first_pieces(w, p.places))] for w, p in zip(inputs, encoded, strict=True)]
        if self.kind == "span":
            sizes = [len(x) for x in self.tokenizer.encode_batch([question for question, _ in inputs])]
            fits = [size + SPECIAL < self.length for size in sizes]
            flat = iter(self._encoded([x for x, ok in zip(inputs, fits, strict=True) if ok]))
            return [[next(flat)] if ok else [] for ok in fits]
        return [[p] for p in self._encoded(inputs)]

    def _encoded(self, inputs: Sequence[tuple[str, ...]]) -> list[Pieces]:
        if not inputs:
            return []
        texts, seconds = [x[0] for x in inputs], None if len(inputs[0]) == 1 else [x[1] for x in inputs]
        strategy = "only_second" if self.kind == "span" else "longest_first"
        rows = self.tokenizer.encodings(texts, seconds, self.length, strategy)
        if self.entries is not None:
            check_ids([i for row in rows for i in row.ids], self.entries, self.tokenizer)
        text = 1 if self.kind == "span" else 0  # the one whose characters labels name
        pieces = []
        for row in rows:
            offsets = [o if s == text else None for o, s in zip(row.offsets, row.sequence_ids, strict=True)]
            ids, types = np.asarray(row.ids, np.int32), np.asarray(row.type_ids, np.int32)
            wanted = self.kind in ("tokens", "span")
            pieces.append(Pieces(ids, types, offsets if wanted else [], bool(row.overflowing)))
        return pieces

    def _spelled(self, inputs: tuple[str, ...]) -> Pieces:
        words = inputs if self.kind == "tokens" else self.tokenizer.words(inputs[0])
        read = words[: self.length - 2]
        ids = characters.batch([read], self.max_characters or 0)[0]
        places = [i + 1 if i < len(read) else None for i in range(len(words))]
        return Pieces(ids, np.zeros(len(ids), np.int32), places, len(read) < len(words))

    def shift(self, pieces: Pieces, length: int) -> int:
        """Number of positions by which padding moves the tokens."""
        return length - len(pieces.ids) if self.left else 0

    def row(self, pieces: Sequence[Pieces], length: int) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and, of pairs where the model has them, `token_type_ids`, padded: `[length]`.

        With the kind `choice` all are `[choices, length]`; characters are `[length, M]`.
        """
        pad = 0 if self.max_characters is not None else self.tokenizer.role("pad") or 0
        pad = pad if self.entries is None or pad < self.entries else 0  # nobody reads it, but its row must be a number

        def padded(p: Pieces, values: np.ndarray, rest: int) -> np.ndarray:
            out = np.full((length, *values.shape[1:]), rest, np.int32)
            begin = self.shift(p, length)
            out[begin : begin + len(values)] = values
            return out

        columns = {"input_ids": [padded(p, p.ids, pad) for p in pieces]}
        columns["attention_mask"] = [padded(p, np.ones(len(p.ids), np.int32), 0) for p in pieces]
        if self.types:
            columns["token_type_ids"] = [padded(p, p.types, 0) for p in pieces]
        return {k: np.stack(v) if self.kind == "choice" else v[0] for k, v in columns.items()}


def _first_pieces(words: Sequence[str], spans: Sequence[tuple[int, int] | None]) -> list[int | None]:
    """The first piece of every word of the words joined by blanks; the blank before it is its own."""
    starts = [0, *itertools.accumulate(len(w) + 1 for w in words)]
    found: dict[int, int] = {}
    for i, span in enumerate(spans):
        if span is not None:
            word = bisect.bisect_right(starts, span[0]) - 1
            found.setdefault(word + (span[0] == starts[word] + len(words[word])), i)
    return [found.get(i) for i in range(len(words))]


class LabeledRows:
    """Row i holds an example and its label (see `Encoder.row`, `objectives.labels`).

    Examples whose label is not in `labels` and those without room are left out; tags that are none, and words that
    were cut or have no piece, do not count. One line says how many.
    """

    def __init__(self, examples: Sequence[Example], encoder: Encoder, labels: Sequence[str], where: str) -> None:
        """`labels` in the model's order; `where` names the part in the line. Raises CorpusError if no row is left."""
        self.encoder, self.rows, bad = encoder, [], BadRows()
        index = {label: i for i, label in enumerate(labels)}
        cut = 0
        self.lost = self.unknown = 0
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            for example, pieces in zip(chunk, encoder([e.inputs for e in chunk]), strict=True):
                try:
                    label = self._label(example, pieces, index)
                except ValueError as e:
                    bad.add(example.name, str(e))
                    continue
                cut += any(p.cut for p in pieces)
                self.rows.append((pieces, label))
        notes = [(bad.count, "left out"), (cut, f"cut to {encoder.length} tokens"), (self.unknown, "unknown tags")]
        notes += [(self.lost, "words cut or without a piece")]
        shown = "".join(f", {n:,} {what}" for n, what in notes if n)
        log.info("%s: %s rows%s", where, f"{len(self.rows):,}", shown)
        if not self.rows:
            raise CorpusError(f"{where}: no row is left{shown}")

    def _label(self, example: Example, pieces: list[Pieces], index: dict[str, int]) -> np.ndarray:
        if not all(len(p.ids) for p in pieces) or not pieces:
            raise ValueError(f"it has no token, or too long a question for {self.encoder.length}")
        kind, label = self.encoder.kind, example.label
        if kind == "regression":
            return np.asarray(label, np.float32)
        if kind == "span":
            return self._span(pieces[0], label)
        if kind == "tokens":
            out = np.full(len(pieces[0].ids), IGNORED, np.int32)
            for place, tag in zip(pieces[0].places, label, strict=True):
                self.lost += place is None
                self.unknown += tag not in index
                if place is not None:
                    out[place] = index.get(tag, IGNORED)
            return out
        if kind == "choice" and len(pieces) != len(index):
            raise ValueError(f"{len(pieces)} choices, and {len(index)} labels that name one")
        if label not in index:
            raise ValueError(f"its label {label!r} is not one of {', '.join(index)}")
        return np.asarray(index[label], np.int32)

    def _span(self, pieces: Pieces, label: tuple[int, int] | None) -> np.ndarray:
        if label is None:  # the answer of a question without one is the first token, [CLS]
            return np.zeros(2, np.int32)
        inside = [i for i, place in enumerate(pieces.places) if place is not None]
        found = [i for i in inside if pieces.places[i][1] > label[0] and pieces.places[i][0] < label[1]]
        if not found or pieces.places[inside[-1]][1] < label[1]:
            raise ValueError(f"its answer stands behind the row's {self.encoder.length} tokens")
        return np.asarray([found[0], found[-1]], np.int32)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """The row, with `labels` and `loss_weights` `[1]`, which say that it counts."""
        pieces, label = self.rows[int(index)]
        length, kind = self.encoder.length, self.encoder.kind
        shift = self.encoder.shift(pieces[0], length)
        if kind == "tokens":
            behind = length - shift - len(label)
            label = np.pad(label, (shift, behind), constant_values=IGNORED)
        elif kind == "span":
            label = label + np.int32(shift)
        return {**self.encoder.row(pieces, length), "labels": label, "loss_weights": np.ones(1, np.float32)}

    def labels(self) -> np.ndarray:
        """All labels that count, as one row."""
        joined = np.concatenate([np.reshape(label, -1) for _, label in self.rows])
        return joined if self.encoder.kind == "regression" else joined[joined != IGNORED]


def without_text(train: LabeledRows, held_out: LabeledRows, count: int) -> tuple[float, float]:
    """(held-out loss, share of held-out labels that are right) of what knows only the training part's labels.

    Their frequencies give the loss (of numbers: the mean, and its squared error), the most frequent one the share.
    Spans have neither: zeros.
    """
    seen, asked = train.labels(), held_out.labels()
    if train.encoder.kind == "span":
        return 0.0, 0.0
    if train.encoder.kind == "regression":
        return float(np.mean(np.square(asked - seen.mean()))), 0.0
    counts = np.bincount(seen, minlength=count)
    share = float(np.mean(asked == counts.argmax()))
    return unigram_nats(counts, np.bincount(asked, minlength=count)), share
