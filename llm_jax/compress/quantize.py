"""Quantized weights: int8, symmetric, one scale per output channel.

Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877 (symmetric form: zero point 0, range [-127, 127]).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.nn import weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.weights import Axes, Weight

KERNELS = weights.LAYER_KERNELS


class Quantized(Weight):
    """`values * scale`.

    Attributes:
      values: int8 `[in, out]` (with a leading layer axis when stacked).
      scale: float32 `[1, out]`: one per output channel; `[in, 1]` for tables, one per row.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.values.shape)

    def dense(self) -> jax.Array:
        """The dequantized matrix, float32."""
        return self.values.astype(self.scale.dtype) * self.scale

    @property
    def _is_per_column(self) -> bool:
        return self.scale.shape[-2] == 1

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x @ (values * scale)`; scales of output channels multiply the result, not the matrix."""
        del key
        if not self._is_per_column:
            return weights.matmul(x, self.dense().astype(x.dtype))
        return weights.scaled(weights.matmul(x, self.values.astype(x.dtype)), self.scale[0])

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x @ (values * scale).T`; scales of output channels multiply the input, not the matrix."""
        if not self._is_per_column:
            return weights.scaled(weights.matmul_t(x, self.values.astype(x.dtype)), self.scale[:, 0])
        return weights.matmul_t(weights.scaled(x, self.scale[0]), self.values.astype(x.dtype))

    def take(self, ids: jax.Array) -> jax.Array:
        """Dequantized rows."""
        rows = jnp.take(self.values, ids, axis=0).astype(self.scale.dtype)
        scale = self.scale[0] if self._is_per_column else jnp.take(self.scale, ids, axis=0)
        return rows * jnp.broadcast_to(scale, rows.shape)

    def axes(self, base: Axes) -> "Quantized":
        """Logical axes: the plain matrix's for the values; the scale keeps the axis that it varies along."""
        *lead, i, o = base
        scale = Axes(*lead, None, o) if self._is_per_column else Axes(*lead, i, None)
        return Quantized(base, scale)  # type: ignore[arg-type]

    def cast(self, dtype: DTypeLike) -> "Quantized":
        """Unchanged: scales stay in float32."""
        del dtype
        return self


@functools.partial(jax.jit, static_argnums=1)  # fused: step by step it would hold four copies of a large matrix
def quantize_array(w: jax.Array, axis: int = -2) -> Quantized:
    """Rounds to the nearest of 255 levels; the error is at most half a step of its channel.

    Args:
      w: `[..., in, out]`.
      axis: the axis that shares a scale: -2 gives one scale per output channel, -1 one per row (tables).
    """
    top = jnp.max(jnp.abs(w), axis=axis, keepdims=True).astype(jnp.float32)
    scale = jnp.where(top == 0, 1.0, top / 127)
    values = jnp.clip(jnp.round(w.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8)
    return Quantized(values, scale)


def quantize(params: Params, targets: str | Iterable[str] = KERNELS) -> Params:
    """Quantizes every plain kernel that matches (embedding tables by row).

    The default takes every kernel of attention, cross-attention and feed-forwards; embeddings, poolers and heads stay.

    Raises:
      ValueError: if a pattern matches nothing.
      TypeError: if a target is structured already.
    """

    def quantized(path: str, w: Any) -> Quantized:
        if weights.is_node(w):
            raise TypeError(f"{path} is {type(w).__name__} already; quantize before attaching, or merge first")
        if not weights.is_matrix(path, w) or not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f"{path} is {w.dtype}{list(w.shape)}, no floating matrix")
        return quantize_array(w, -1 if path.endswith("embedding") else -2)

    return weights.replace(params, targets, quantized)


def dequantize(params: Params, dtype: DTypeLike = jnp.float32) -> Params:
    """Plain arrays instead of quantized weights; serve from these on a CPU, whose int8 products are slow."""

    def plain(w: Any) -> Any:
        return _dense(w, dtype) if isinstance(w, Quantized) else w

    return jax.tree.map(plain, params, is_leaf=lambda x: isinstance(x, Quantized))


@functools.partial(jax.jit, static_argnums=1)
def _dense(w: Quantized, dtype: DTypeLike) -> jax.Array:
    return w.dense().astype(dtype)
