"""Rows of a token table that train while the table stays: new or rare tokens.

Source: the behaviour of peft's `TrainableTokensLayer`: the rows replace those of the table, in its lookups and, where
the table is tied, in the output layer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.delta.node import Bias, Delta, DeltaError
from llm_jax.nn import weights
from llm_jax.nn.weights import Axes


class TokenRows(Delta):
    """`base` with the rows `ids` replaced.

    Attributes:
      base: a table `[V, D]`.
      rows: `[n, D]`, those of the base at first.
      ids: n numbers of rows, ascending. Static.
    """

    base: Any
    rows: jax.Array
    ids: tuple[int, ...] = struct.field(pytree_node=False)

    trains: ClassVar[tuple[str, ...]] = ("rows",)
    name: ClassVar[str] = "trained token rows"

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Writes the rows into the table."""
        return matrix.at[jnp.array(self.ids)].set(self.rows.astype(matrix.dtype)), bias

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Refused: the rows before are not stored."""
        raise DeltaError("trained token rows cannot be taken out of a merged table: keep the tree of before")

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x @ table.T`: the base's product, with the trained rows' columns in it."""
        y = weights.matmul_t(x, self.base)
        return y.at[..., jnp.array(self.ids)].set(weights.matmul_t(x, self.rows).astype(y.dtype))

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the base; those that train where `ids` names them."""
        own = jnp.array(self.ids)
        place = jnp.clip(jnp.searchsorted(own, ids), 0, len(self.ids) - 1)
        trained = jnp.take(own, place) == ids
        rows = weights.take(self.rows, place)
        base = weights.take(self.base, ids)
        return jnp.where(trained[..., None], rows.astype(base.dtype), base)

    def axes(self, base: Axes) -> "TokenRows":
        """The rows are whole, their numbers follow the table's."""
        return TokenRows(weights.axes_of(self.base, base), Axes(None, base[-1]), self.ids)  # type: ignore[arg-type]


def attach(table: Any, ids: Sequence[int]) -> TokenRows:
    """Makes some rows of a table trainable.

    Raises:
      DeltaError: if there are none, a number is outside the table or named twice.
    """
    size = weights.shape_of(table)[0]
    chosen = sorted(ids)
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < size:
        raise DeltaError(f"token rows {list(ids)[:5]} must be different numbers from 0 to {size - 1}")
    return TokenRows(table, weights.dense(table)[jnp.array(chosen)], tuple(chosen))
