"""Sizes that both sides run, by platform."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """Sizes of GPT-2's training step and of the matrix product that bounds it.

    Attributes:
      rows: of a batch.
      length: tokens a row.
      side: of the square matrices.
    """

    rows: int
    length: int
    side: int


CPU, GPU = Sizes(rows=4, length=256, side=3072), Sizes(rows=32, length=1024, side=8192)
