"""Batches with grain: deterministic shuffle, blocks of every batch for each process, a state that is a single number.

Batch i of a run holds the same rows in the same order on any number of processes, so the state (batches taken) and
what a model remembers row by row resume exactly, also onto another number of processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.source import Row, RowSource

ENDLESS = 2**50  # rows


def abstract_batch(row: Row, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of rows like this one, without its values."""
    arrays = {name: np.asarray(value) for name, value in row.items()}
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype) for name, x in arrays.items()}


class Loader:
    """An endless iterator over batches that knows where it is.

    Attributes:
      batch_size: global rows per batch.
    """

    def __init__(
        self,
        source: RowSource,
        batch_size: int,
        seed: int,
        blocks: Sequence[int] | None = None,
        count: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """Reads this process's blocks of every batch.

        Args:
          source: rows by number.
          batch_size: global rows per batch.
          seed: every epoch is shuffled anew from it.
          blocks: which of a batch's `count` equal blocks this process reads, ascending (`Plan.data_blocks`); one block
            a process by default.
          count: blocks of a batch; one a process by default.
          shuffle: False where row b of a batch continues row b of the batch before.

        Raises:
          CorpusError: if there are no rows.
          ValueError: if the batch does not divide into the blocks.
        """
        blocks = [jax.process_index()] if blocks is None else blocks
        count = jax.process_count() if count is None else count
        if batch_size % count:
            raise ValueError(f"training.batch_size={batch_size} does not divide into {count} blocks of processes")
        if len(source) < 1:
            raise CorpusError("the corpus has no rows")
        self.batch_size, self._source = batch_size, source
        # not repeat(None), whose length grain cannot divide into batches of one row
        rows = grain.MapDataset.source(source).seed(seed)
        rows = (rows.shuffle() if shuffle else rows).repeat(max(1, ENDLESS // len(source)))
        size = batch_size // count
        positions = [block * size + i for block in blocks for i in range(size)]

        def row(index: int) -> Row:
            batch, i = divmod(index, len(positions))
            return rows[batch * batch_size + positions[i]]

        share = rows if len(positions) == batch_size else grain.MapDataset.range(len(rows) // count).map(row)
        batches = share.batch(len(positions))
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Returns this loader, which is its own iterator."""
        return self

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A whole batch, of all processes, without its values."""
        return abstract_batch(self._source[0], self.batch_size)

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, this process's rows."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Position in the data as a JSON-ready value, for checkpoints."""
        return dict(self._iterator.get_state())

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a position that `state` returned."""
        self._iterator.set_state(state)


def eval_batches(source: RowSource, batch_size: int, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """All rows once, in order; the last batch is filled with rows of weight 0, so every batch has one shape."""
    count = len(source) if limit is None else min(len(source), limit * batch_size)
    for start in range(0, count, batch_size):
        rows = [source[i] for i in range(start, min(start + batch_size, count))]
        for row in rows:
            row.setdefault("loss_weights", np.ones(row["input_ids"].shape, np.float32))
        while len(rows) < batch_size:
            rows.append({k: np.zeros_like(v) for k, v in rows[0].items()})
        yield {k: np.stack([r[k] for r in rows]) for k in rows[0]}
