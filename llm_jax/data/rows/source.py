"""What every kind of rows is: a sequence that computes row i when it is asked for."""

from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeAlias

Row: TypeAlias = dict[str, Any]  # fields by name: NumPy arrays and scalars, equal shapes in every row


class RowSource(Protocol):
    """Rows by number, as `data.loader.Loader` reads them."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: SupportsIndex, /) -> Row:
        """Row `index`."""
        ...


class Rows(NamedTuple):
    """What a run reads.

    Attributes:
      train: training rows.
      held_out: held-out rows, None without.
      tokens_per_byte: tokens a byte of the held-out text, 0 where there is no such text.
      baseline: the held-out loss of whoever knows only how often each token or label is in the training part; 0 where
        that is not known.
    """

    train: RowSource
    held_out: RowSource | None
    tokens_per_byte: float = 0.0
    baseline: float = 0.0
