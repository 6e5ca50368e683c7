"""LoRA: a kernel W becomes W + scale * A B, of which only A and B train.

`attach` puts a `Lora` node where a kernel stood; the model runs it unchanged, over a plain array or over any other
structured weight (over a quantized one it is QLoRA):

    decoder/layers/attention/query/kernel         float32[L, D, D]
    ->
    decoder/layers/attention/query/kernel         Lora
    decoder/layers/attention/query/kernel/base    float32[L, D, D]
    decoder/layers/attention/query/kernel/a       float32[L, D, r]    trains
    decoder/layers/attention/query/kernel/b       float32[L, r, D]    trains, zero at first

`merge` folds it in and `unmerge` takes it out again, for a model that serves between two trainings; `detach` gives the
base back.

Ranks and scales may differ from layer to layer of a stacked tree. A and B are then padded with zeros to the largest
rank, and a layer without LoRA has rank 0. A padded column of A and its row of B are both zero, so both have a gradient
of zero and stay zero. `LayeredLora.ranks` says how many columns of each layer are real.

Sources: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA: alpha / sqrt(r)),
https://arxiv.org/abs/2312.03732.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from llm_jax.delta import targets
from llm_jax.delta.node import Bias, Delta, DeltaError, check_matrix, detach, merge, unmerge
from llm_jax.delta.starts import STARTS
from llm_jax.nn import paths, weights
from llm_jax.nn.attend import drop
from llm_jax.nn.protocols import Params
from llm_jax.nn.weights import Axes

__all__ = ["TRAINABLE", "LayeredLora", "Lora", "LoraConfig", "attach", "detach", "merge", "unmerge"]

TRAINABLE = ("*/a", "*/b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The kernels that get LoRA, and its rank, scale and dropout.

    Attributes:
      targets: names or patterns of kernels, see `delta.targets`. The default takes every kernel of attention,
        cross-attention and feed-forwards, and leaves embeddings, poolers, heads and recurrent layers as they are.
      rank: r, the width between A and B.
      alpha: the product is scaled by alpha / r, or alpha / sqrt(r) with `rs`.
      dropout: rate on the input of A while training.
      rs: rank-stabilised scaling.
      ranks: other ranks of some targets, each `target=rank`: `layers[0:4].mlp=2`.
      alphas: other alphas of some targets, each `target=alpha`.
      start: first values: `zero` (A at random, B zero), or `pissa`, `olora`, `loftq`, which take A and B out of the
        base (see `delta.starts`).
      dora: lengths of columns train too (see `delta.dora`).
      freeze_a: A stays as it was drawn and only B trains (LoRA-FA).
      ratio: learning rate of B over that of A; 16 in LoRA+.
    """

    targets: tuple[str, ...] = weights.LAYER_KERNELS
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rs: bool = False
    ranks: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()
    start: str = "zero"
    dora: bool = False
    freeze_a: bool = False
    ratio: float = 1.0

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.start not in ("zero", *STARTS):
            raise ValueError(f"start={self.start!r} is not one of zero, {', '.join(STARTS)}")
        if self.ratio <= 0:
            raise ValueError(f"ratio={self.ratio} must be positive")
        if self.freeze_a and self.ratio != 1:
            raise ValueError(f"ratio={self.ratio} has no effect with freeze_a: A does not train")
        if self.start != "zero" and (self.ranks or self.alphas):
            raise ValueError(f"start={self.start} takes one rank and alpha: leave ranks and alphas")

    def scale_of(self, rank: float, alpha: float) -> float:
        """Factor of a product A B with this rank and alpha."""
        return alpha / (math.sqrt(rank) if self.rs else rank)

    @property
    def scale(self) -> float:
        """Factor of the product A B."""
        return self.scale_of(self.rank, self.alpha)


class Lora(Delta):
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

    trains: ClassVar[tuple[str, ...]] = ("a", "b")
    name: ClassVar[str] = "LoRA"

    def scaled(self, y: jax.Array) -> jax.Array:
        """`y` times the scale, in float32 and rounded once; `y` leads with the axis of layers where the node does."""
        return weights.scaled(y, self.scale)

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Adds the update to the matrix."""
        return matrix + self.scaled(self.a @ self.b).astype(matrix.dtype), bias

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Subtracts the update from the matrix."""
        return matrix - self.scaled(self.a @ self.b).astype(matrix.dtype), bias

    def update(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`scale * (drop(x) @ a) @ b`, the part beside the base's product.

        The scale multiplies B, which is small: on the product it would cost a pass over all outputs, and one over their
        gradients.
        """
        if key is not None and self.dropout > 0:
            x = drop(x, self.dropout, key)
        return weights.matmul(weights.matmul(x, self.a), self.scaled(self.b))

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x @ base + scale * (x @ a) @ b`; forming W + A B would cost the full weight gradient."""
        return weights.matmul(x, self.base, key) + self.update(x, key)

    def linear(self, x: jax.Array, bias: Bias, key: jax.Array | None = None) -> jax.Array:
        """`x @ base + bias + scale * (x @ a) @ b`; the base may change its bias."""
        return weights.linear(x, self.base, bias, key) + self.update(x, key)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x @ base.T + scale * (x @ b.T) @ a.T`."""
        return weights.matmul_t(x, self.base) + weights.matmul_t(weights.matmul_t(x, self.b), self.scaled(self.a))

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the merged matrix."""
        return weights.take(self.base, ids) + weights.matmul(weights.take(self.a, ids), self.scaled(self.b))

    def axes(self, base: Axes) -> "Lora":
        """A takes the input axis, B the output axis; the rank stays whole."""
        *lead, i, o = base
        return self.replace(base=weights.axes_of(self.base, base), a=Axes(*lead, i, None), b=Axes(*lead, None, o))

    def cast(self, dtype: DTypeLike) -> "Lora":
        """Casts base, A and B; a quantized base keeps its scales, and so does LoRA."""
        a, b = weights.cast(self.a, dtype), weights.cast(self.b, dtype)
        return self.replace(base=weights.cast(self.base, dtype), a=a, b=b)


class LayeredLora(Lora, kw_only=True):
    """LoRA whose rank or scale differs from layer to layer of a stacked tree.

    Attributes:
      scales: float32 `[L]`, a further factor of every layer (a scalar inside a layer).
      ranks: real columns of `a` in every layer of the stack; the others are zero, as are their rows of `b`. Static.
    """

    scales: jax.Array
    ranks: tuple[int, ...] = struct.field(pytree_node=False)

    def scaled(self, y: jax.Array) -> jax.Array:
        """`y` times the layer's scale, in float32 and rounded once."""
        scales = self.scales.reshape(*self.scales.shape, *[1] * (y.ndim - self.scales.ndim))
        return weights.scaled(y, self.scale * scales)

    def axes(self, base: Axes) -> "LayeredLora":
        """Logical axes of LoRA's arrays; the scales take the axis of layers."""
        axes: LayeredLora = super().axes(base)  # type: ignore[assignment]
        return axes.replace(scales=Axes(*base[:-2]))


def ranks_of(w: Lora) -> tuple[int, ...] | None:
    """Real columns of A in every layer; None where all are real."""
    return w.ranks if isinstance(w, LayeredLora) else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fresh(
    key: jax.Array, index: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    bound = 1 / math.sqrt(shape_a[-2])
    a = jax.random.uniform(jax.random.fold_in(key, index), shape_a, jnp.float32, -bound, bound)
    return a, jnp.zeros(shape_b, jnp.float32)


def columns(ranks: tuple[int, ...], rank: int) -> np.ndarray:
    """`[L, r]` bool: the real columns of A in every layer."""
    return np.arange(rank) < np.array(ranks)[:, None]


Numbers = Mapping[str, Mapping[int | None, float]]  # path -> layer, or None -> number


def _plan(
    path: str, config: LoraConfig, count: int | None, chosen: targets.Layers | None, ranks: Numbers, alphas: Numbers
) -> tuple[list[int], list[float]]:
    """(ranks, scales) of the layers of a weight, or of the one weight; rank 0 and scale 0 where it has no LoRA."""
    layers: list[int | None] = [None] if count is None else list(range(count))
    own_ranks, own_scales = [], []
    for layer in layers:
        rank = ranks.get(path, {}).get(layer, config.rank)
        if chosen is not None and layer not in chosen:
            rank = 0
        if rank != int(rank) or rank < 0:
            raise DeltaError(f"ranks give {path} a rank of {rank}, which is not a whole number from 0")
        alpha = alphas.get(path, {}).get(layer, config.alpha)
        own_ranks.append(int(rank))
        own_scales.append(config.scale_of(rank, alpha) if rank else 0.0)
    return own_ranks, own_scales


def attach(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Puts LoRA on every target; A is uniform as in the paper's code (Kaiming, a = sqrt(5)), B zero.

    Args:
      params: stacked or unstacked.
      config: targets, ranks and scales.
      key: draws A.

    Raises:
      DeltaError, ValueError: if a target matches nothing or is not a matrix, it carries LoRA already, or a rank exceeds
        the sides of the matrix.
    """
    flat = paths.flatten(params, weights.is_node)
    index = {p: i for i, (p, _) in enumerate(flat)}
    chosen = targets.resolve(params, config.targets)
    ranks, alphas = (targets.numbers_of(params, texts) for texts in (config.ranks, config.alphas))
    unused = sorted((ranks.keys() | alphas.keys()) - chosen.keys())
    if unused:
        raise DeltaError(f"ranks or alphas name {unused[0]}, which is not a target")

    def adapted(path: str, w: Any) -> Any:
        if isinstance(w, Lora):
            raise DeltaError(f"{path} carries LoRA already; merge or detach it first")
        check_matrix(path, w, "LoRA goes on kernels")
        *lead, fan_in, fan_out = weights.shape_of(w)
        own_ranks, own_scales = _plan(path, config, lead[0] if lead else None, chosen[path], ranks, alphas)
        rank = max(own_ranks)
        if rank > min(fan_in, fan_out):
            raise DeltaError(f"{path} is {fan_in} x {fan_out}: rank={rank} exceeds its smaller side")
        if rank == 0:
            return w
        a, b = _fresh(key, index[path], (*lead, fan_in, rank), (*lead, rank, fan_out))
        if config.start != "zero":
            if chosen[path] is not None:
                raise DeltaError(
                    f"start={config.start} changes the base of all layers: leave layers[...] out of targets"
                )
            if weights.is_node(w):
                raise DeltaError(f"start={config.start} needs a plain matrix; {path} is {type(w).__name__}")
            return Lora(*STARTS[config.start](w, rank, own_scales[0]), own_scales[0], config.dropout)
        if len(set(own_ranks)) == len(set(own_scales)) == 1:
            return Lora(w, a, b, own_scales[0], config.dropout)
        a = jnp.where(columns(tuple(own_ranks), rank)[:, None, :], a, 0)
        scales = jnp.asarray(own_scales, jnp.float32)
        return LayeredLora(w, a, b, 1.0, config.dropout, scales=scales, ranks=tuple(own_ranks))

    return paths.map_with_path(lambda p, w: adapted(p, w) if p in chosen else w, params, is_leaf=weights.is_node)


def count(w: Lora) -> int:
    """Numbers that train, without padding."""
    ranks = ranks_of(w)
    return weights.count((w.a, w.b)) if ranks is None else sum(ranks) * sum(w.shape[-2:])
