"""A weight whose low-rank update depends on the row of the batch; `delta.bank` makes and changes it.

Few rows multiply with all adapters at once and keep the numbers of their own, so that every adapter is read once and
nothing is copied; many rows multiply with copies of their own. The kernels of SmolLM2-135M with 8 adapters of rank 8,
over the time with one adapter (2 cores, medians):

    batch            all at once   copies
    8 x 1 token      1.15          1.33
    8 x 64 tokens    1.18          1.09

Source: the problem is that of Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", https://arxiv.org/abs/2310.18547.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.delta.node import Bias, Delta, DeltaError
from llm_jax.nn import weights
from llm_jax.nn.weights import Axes


class Bank(Delta):
    """`base + scales[k] * a[:, k] @ b[k]`, with k chosen by row.

    Attributes:
      base: any weight that is not a delta, `[in, out]` (all arrays with a leading layer axis when stacked).
      a: `[in, K, r]`; columns behind an adapter's rank are zero.
      b: `[K, r, out]`.
      scales: float32 `[K]`.
      ids: int32 `[B]`, the adapter of each row, -1 for none; without axes, that of all rows of any batch; None until
        `choose` says.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scales: jax.Array
    ids: jax.Array | None = None

    name: ClassVar[str] = "a bank of LoRAs"

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Refused: which adapter?"""
        raise DeltaError("a bank of LoRAs cannot be merged: take one adapter out of it first (bank.adapter)")

    unfold = fold

    def _chosen(self, rows: int) -> jax.Array:
        if self.ids is None:
            raise DeltaError("no adapter of the bank is chosen: call bank.choose(params, rows, names)")
        if self.ids.ndim and self.ids.shape[0] != rows:
            raise DeltaError(
                f"the bank has adapters chosen for {self.ids.shape[0]} rows, and a product has {rows}: choose one for "
                "every row with bank.choose (several choices of an input are rows each, beams are bank.repeated)"
            )
        return self.ids

    def _scaled(self, y: jax.Array, ids: jax.Array) -> jax.Array:
        """`y` times its rows' scales: 0 without an adapter, not a number where `ids` is out of range."""
        count = self.scales.shape[0]
        scales = jnp.where((ids < -1) | (ids >= count), jnp.nan, self.scales[jnp.clip(ids, 0, count - 1)])
        by_row = lambda v: v.reshape(*ids.shape, *[1] * (y.ndim - ids.ndim))
        y = weights.scaled(y, by_row(scales))
        # not times zero: in half precision the product with somebody else's adapter may be infinite
        return jnp.where(jnp.broadcast_to(by_row(ids == -1), y.shape), 0, y)

    def _own(self, h: jax.Array, ids: jax.Array) -> jax.Array:
        """`h[..., K * r]` with zeros everywhere but in the row's own adapter."""
        count, rank = self.b.shape[0], self.b.shape[1]
        own = jnp.repeat(jax.nn.one_hot(ids, count, dtype=bool), rank, axis=-1)  # [K r] or [B, K r]
        own = own.reshape(*ids.shape, *[1] * (h.ndim - 1 - ids.ndim), count * rank)
        return jnp.where(jnp.broadcast_to(own, h.shape), h, 0)

    def _few(self, x: jax.Array, ids: jax.Array) -> bool:
        """Whether all adapters at once cost less than copies of each row's own."""
        return ids.ndim > 0 and math.prod(x.shape[:-1]) <= weights.FEW_ROWS and self.b.shape[0] <= 2 * x.shape[0]

    def update(self, x: jax.Array) -> jax.Array:
        """`scales[k] * (x @ a[:, k]) @ b[k]` by row."""
        ids, (fan_in, count, rank), fan_out = self._chosen(x.shape[0]), self.a.shape, self.b.shape[-1]
        if self._few(x, ids):
            h = self._own(weights.matmul(x, self.a.reshape(fan_in, count * rank)), ids)
            return weights.matmul(self._scaled(h, ids), self.b.reshape(count * rank, fan_out))
        own = jnp.clip(ids, 0, count - 1)
        a, b = jnp.take(self.a, own, axis=1), jnp.take(self.b, own, axis=0)  # [in, r], or [in, B, r]
        if not ids.ndim:
            return weights.matmul(self._scaled(weights.matmul(x, a), ids), b)
        h = self._scaled(jax.lax.dot_general(x, a, (((x.ndim - 1,), (0,)), ((0,), (1,)))), ids)
        return jax.lax.dot_general(h, b, (((h.ndim - 1,), (1,)), ((0,), (0,))))

    def linear(self, x: jax.Array, bias: Bias, key: jax.Array | None = None) -> jax.Array:
        """`x @ base + bias`, and the update of each row."""
        return weights.linear(x, self.base, bias, key) + self.update(x)

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x @ base`, and the update of each row."""
        return weights.matmul(x, self.base, key) + self.update(x)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x @ base.T`, and the update of each row, by all adapters at once."""
        ids, (fan_in, count, rank), fan_out = self._chosen(x.shape[0]), self.a.shape, self.b.shape[-1]
        h = self._scaled(self._own(weights.matmul_t(x, self.b.reshape(count * rank, fan_out)), ids), ids)
        return weights.matmul_t(x, self.base) + weights.matmul_t(h, self.a.reshape(fan_in, count * rank))

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows `ids[B, ...]` of the table, with the update of each row of the batch."""
        chosen, (_, count, rank), fan_out = self._chosen(ids.shape[0]), self.a.shape, self.b.shape[-1]
        h = self._own(jnp.take(self.a, ids, axis=0).reshape(*ids.shape, count * rank), chosen)
        rows = weights.take(self.base, ids)
        update = weights.matmul(self._scaled(h, chosen), self.b.reshape(count * rank, fan_out))
        return rows + update.astype(rows.dtype)

    def axes(self, base: Axes) -> "Bank":
        """A takes the input axis, B the output axis; adapters, ranks and choices stay whole."""
        *lead, i, o = base
        chosen = None if self.ids is None else Axes(*lead, *[None] * (self.ids.ndim - len(lead)))
        return Bank(
            weights.axes_of(self.base, base),
            Axes(*lead, i, None, None),  # type: ignore[arg-type]
            Axes(*lead, None, None, o),  # type: ignore[arg-type]
            Axes(*lead, None),  # type: ignore[arg-type]
            chosen,  # type: ignore[arg-type]
        )

    def cast(self, dtype: DTypeLike) -> "Bank":
        """Casts base, A and B; scales stay in float32."""
        a, b = weights.cast(self.a, dtype), weights.cast(self.b, dtype)
        return self.replace(base=weights.cast(self.base, dtype), a=a, b=b)
