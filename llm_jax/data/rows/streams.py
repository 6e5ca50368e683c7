"""Rows for models that remember: batch i + 1 continues where batch i stopped, row by row; and words with characters."""

from typing import SupportsIndex

import numpy as np

from llm_jax.data.characters import character_ids
from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.source import Row, RowSource
from llm_jax.data.tokenizers import Tokenizer


class Streams:
    """The rows of a text in another order: as many streams side by side as a batch has rows.

    Read in order and in batches of `count`, row b of a batch is followed by row b of the next. `continues` says where
    that is so: everywhere but in the first batch of an epoch.

    With `both_ways` the streams of the second half run backwards: from their last row to the first, each reversed.
    `backwards` says so, row by row.
    """

    def __init__(self, rows: RowSource, count: int, both_ways: bool = False) -> None:
        """Raises CorpusError where there are fewer rows than streams."""
        self.rows, self.count, self.length, self.both_ways = rows, count, len(rows) // count, both_ways
        if self.length < 1:
            raise CorpusError(f"{len(rows)} rows are too few for {count} streams: lower training.batch_size")

    def __len__(self) -> int:
        """Rows, a multiple of the streams."""
        return self.count * self.length

    def __getitem__(self, index: SupportsIndex) -> Row:
        """The row, with `continues`, and `backwards` where rows run both ways."""
        step, stream = divmod(int(index), self.count)
        flags = {"continues": np.bool_(step > 0)}
        if not self.both_ways:
            return {**self.rows[stream * self.length + step], **flags}
        backwards = stream >= self.count // 2
        row = self.rows[stream * self.length + (self.length - 1 - step if backwards else step)]
        if backwards:
            row = {name: values[::-1] for name, values in row.items()}
        return {**row, **flags, "backwards": np.bool_(backwards)}


class CharacterRows:
    """Rows of words with `character_ids`, `[T + 1, size]` int32."""

    def __init__(self, rows: RowSource, tokenizer: Tokenizer, size: int) -> None:
        """Computes the characters of every vocabulary entry once."""
        self.rows = rows
        self.table = np.stack([character_ids(tokenizer.token(i), size) for i in range(tokenizer.vocab_size)])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Row `index` with the characters of its tokens."""
        row = self.rows[int(index)]
        return {**row, "character_ids": self.table[row["input_ids"]]}
