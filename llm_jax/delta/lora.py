"""LoRA: a kernel W becomes W + scale * A B, of which only A and B train.

`attach` puts a `Lora` node where a kernel stood; the model runs it unchanged, over a plain array or over any other
structured weight (over a quantized one it is QLoRA). `merge` folds it in and `unmerge` takes it out again, for a
model that serves between two trainings; `detach` gives the base back.

Sources: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA: alpha / sqrt(r)),
https://arxiv.org/abs/2312.03732.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from llm_jax.nn import paths, weights
from llm_jax.nn.attend import drop
from llm_jax.nn.protocols import Params
from llm_jax.nn.weights import Axes, Weight

TRAINABLE = ("*/a", "*/b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The kernels that get LoRA, and its rank, scale and dropout.

    Attributes:
      targets: patterns of kernels (see `nn.paths`). The default takes every kernel of attention, cross-attention and
        feed-forwards, and leaves embeddings, poolers, heads and recurrent layers as they are.
      rank: r, the width between A and B.
      alpha: the product is scaled by alpha / r, or alpha / sqrt(r) with `rs`.
      dropout: rate on the input of A while training.
      rs: rank-stabilised scaling.
    """

    targets: tuple[str, ...] = weights.LAYER_KERNELS
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rs: bool = False

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor of the product A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


class Lora(Weight):
    """`base + scale * a @ b`.

    Attributes:
      base: any weight, `[in, out]` (with a leading layer axis when stacked).
      a: `[in, r]`.
      b: `[r, out]`, zero at first, so that attaching changes nothing.
      scale: factor on `a @ b`; static.
      dropout: rate on the input of `a` where a key is passed; static.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base matrix."""
        return weights.shape_of(self.base)

    def dense(self) -> jax.Array:
        """The merged matrix, base plus update."""
        base = weights.dense(self.base)
        return base + weights.scaled(self.a @ self.b, self.scale).astype(base.dtype)

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x @ base + scale * (x @ a) @ b`; forming W + A B would cost the full weight gradient."""
        y = weights.matmul(x, self.base, key)
        if key is not None and self.dropout > 0:
            x = drop(x, self.dropout, key)
        return y + weights.scaled(weights.matmul(weights.matmul(x, self.a), self.b), self.scale)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x @ base.T + scale * (x @ b.T) @ a.T`."""
        delta = weights.matmul_t(weights.matmul_t(x, self.b), self.a)
        return weights.matmul_t(x, self.base) + weights.scaled(delta, self.scale)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the merged matrix."""
        delta = weights.matmul(weights.take(self.a, ids), self.b)
        return weights.take(self.base, ids) + weights.scaled(delta, self.scale)

    def axes(self, base: Axes) -> "Lora":
        """A takes the input axis, B the output axis; the rank stays whole."""
        *lead, i, o = base
        inner: Any = weights.axes_of(self.base, base)
        return Lora(inner, Axes(*lead, i, None), Axes(*lead, None, o), self.scale, self.dropout)  # type: ignore[arg-type]

    def cast(self, dtype: DTypeLike) -> "Lora":
        """Casts base, A and B; a quantized base keeps its scales."""
        return self.replace(
            base=weights.cast(self.base, dtype), a=weights.cast(self.a, dtype), b=weights.cast(self.b, dtype)
        )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fresh(
    key: jax.Array, index: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    bound = 1 / math.sqrt(shape_a[-2])
    a = jax.random.uniform(jax.random.fold_in(key, index), shape_a, jnp.float32, -bound, bound)
    return a, jnp.zeros(shape_b, jnp.float32)


def attach(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Puts LoRA on every kernel that matches; A is uniform as in the paper's code (Kaiming, a = sqrt(5)), B zero.

    Raises:
      ValueError: if a pattern matches nothing, a target is not a matrix, or it carries LoRA already.
    """
    names = [p for p, _ in paths.flatten(params, weights.is_node)]
    index = {p: i for i, p in enumerate(names)}

    def adapted(path: str, w: Any) -> Lora:
        if isinstance(w, Lora):
            raise ValueError(f"{path} carries LoRA already; merge or detach it first")
        shape = weights.shape_of(w)
        if not weights.is_matrix(path, w):
            raise ValueError(f"{path} has shape {shape} and is not a matrix; LoRA goes on kernels")
        *lead, fan_in, fan_out = shape
        a, b = _fresh(key, index[path], (*lead, fan_in, config.rank), (*lead, config.rank, fan_out))
        return Lora(w, a, b, config.scale, config.dropout)

    return weights.replace(params, config.targets, adapted)


def _is_lora(x: Any) -> bool:
    return isinstance(x, Lora)


def _map_lora(params: Params, fn: Callable[[Lora], Any]) -> Params:
    if not any(map(_is_lora, jax.tree.leaves(params, is_leaf=_is_lora))):
        raise ValueError("there is no LoRA in these parameters")
    return jax.tree.map(lambda w: fn(w) if _is_lora(w) else w, params, is_leaf=_is_lora)


def merge(params: Params) -> Params:
    """Folds every LoRA into its base, which becomes a plain array (quantize it again where it was quantized)."""
    return _map_lora(params, weights.materialize)


def unmerge(merged: Params, params: Params) -> Params:
    """Undoes `merge`: the bases with `scale * a @ b` subtracted, under the LoRA nodes of `params`."""

    def restored(w: Any, m: Any) -> Any:
        return w.replace(base=_subtract(m, w.a, w.b, w.scale)) if _is_lora(w) else m

    return jax.tree.map(restored, params, merged, is_leaf=_is_lora)


@functools.partial(jax.jit, static_argnames="scale")
def _subtract(merged: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    return merged - weights.scaled(a @ b, scale).astype(merged.dtype)


def detach(params: Params) -> Params:
    """The same tree with every LoRA replaced by its base."""
    return _map_lora(params, lambda w: w.base)
