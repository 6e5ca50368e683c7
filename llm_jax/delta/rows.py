"""Rows of a token table that train while the table stays: new or rare tokens.

Source: the behaviour of peft's `TrainableTokensLayer`: the rows replace those of the table, in its lookups and, where
the table is tied, in the output layer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
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
        # products with zeros and ones and no scatter: partitioners cannot divide its gradient
        place_NV = np.arange(y.shape[-1]) == np.array(self.ids)[:, None]
        trained = weights.matmul(weights.matmul_t(x, self.rows), jnp.asarray(place_NV, y.dtype))
        return jnp.where(jnp.broadcast_to(place_NV.any(axis=0), y.shape), trained.astype(y.dtype), y)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the base; those that train where `ids` names them."""
        # a product and not a gather: partitioners cannot divide a gather from a few rows
        hits = ids[..., None] == jnp.broadcast_to(jnp.array(self.ids), (*ids.shape, len(self.ids)))
        base = weights.take(self.base, ids)
        trained = weights.matmul(hits.astype(self.rows.dtype), self.rows)
        return jnp.where(jnp.any(hits, axis=-1, keepdims=True), trained.astype(base.dtype), base)

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
