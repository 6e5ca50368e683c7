"""The attention layer: multi-head and grouped-query, of one sequence or to a source, with an optional cache.

Two doors stand open. An encoding of positions is a `Positions`: the layer asks it to rotate queries and keys, to add to
scores, and to add to values. Another attention is a layer that is called as `Attention` is (`AttentionLayer`) and that
a `BlockConfig` names.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 (grouped queries),
https://arxiv.org/abs/2305.13245.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask, attend, attention_weights, drop
from llm_jax.nn.cache import LayerCache, joined
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import RMSNorm
from llm_jax.nn.protocols import Tree


class ScoreTerms(NamedTuple):
    """What positions add to attention scores.

    Attributes:
      slopes_N: times the distance, for kernels that add it themselves (ALiBi); None for nothing.
      bias_BNTS: numbers, B or 1 rows; None for nothing.
    """

    slopes_N: jax.Array | None = None
    bias_BNTS: jax.Array | None = None


class LayerPositions(Protocol):
    """What one attention layer does with positions: a `Positions`, or a module with parameters of the layer."""

    @property
    def reads_weights(self) -> bool:
        """Whether `values` adds anything; attention then computes its weights."""
        ...

    def rotate(self, x_BTNH: jax.Array, shared: Tree) -> jax.Array:
        """Queries or keys with their positions in them; `shared` is what `Positions.shared` returned."""
        ...

    def scores(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> ScoreTerms:
        """What is added to the scaled scores of queries and keys; `cached` says that the keys lie in a cache."""
        ...

    def values(self, w_BNTS: jax.Array, mask: Mask, cached: bool) -> jax.Array:
        """What is added to the output `[B, T, N, H]`, from the attention weights."""
        ...


@dataclasses.dataclass(frozen=True)
class Positions:
    """An encoding of positions. This one is none: every method returns what it is given, or adds nothing.

    A subclass overrides what its encoding changes. `embed` and `shared` run once a model and may declare parameters
    there (`positions/...`); the methods of `LayerPositions` run in every layer, on what `layer` returns.

    Attributes:
      score_parts: products that a score sums, so that scores are divided by sqrt(score_parts * H).
      scales_tokens: token rows are multiplied by sqrt(D) before `embed`.
      every_head: needs as many key heads as query heads.
      reads_weights: see `LayerPositions`.
    """

    score_parts: ClassVar[int] = 1
    scales_tokens: ClassVar[bool] = False
    every_head: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False

    @property
    def length(self) -> int | None:
        """How many positions there are; None without a limit."""
        return None

    def embed(self, config: "AttentionConfig", x_BTD: jax.Array, positions_BT: jax.Array, dtype: Any) -> jax.Array:
        """Token embeddings with their positions in them; `dtype` is that of a table's rows, None for its own."""
        del config, positions_BT, dtype
        return x_BTD

    def shared(
        self, config: "AttentionConfig", positions_BT: jax.Array, mask: Mask, cached: bool, dtype: jnp.dtype
    ) -> Tree:
        """A tree that all layers read; its arrays are fields of a `struct` whose names end in their shapes."""
        del config, positions_BT, mask, cached, dtype
        return None

    def layer(self, config: "AttentionConfig") -> LayerPositions:
        """What a layer asks; called inside of the layer, whose submodule may hold parameters (`relative/...`)."""
        del config
        return self

    def rotate(self, x_BTNH: jax.Array, shared: Tree) -> jax.Array:
        """See `LayerPositions`."""
        del shared
        return x_BTNH

    def scores(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> ScoreTerms:
        """See `LayerPositions`."""
        del q_BTNH, k_BSKH, mask, cached, shared
        return ScoreTerms()

    def values(self, w_BNTS: jax.Array, mask: Mask, cached: bool) -> jax.Array:
        """See `LayerPositions`."""
        raise TypeError(f"{type(self).__name__} adds nothing to values")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Sizes and options of one attention layer.

    Attributes:
      model_dim: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N must be a multiple of K.
      head_dim: H.
      qkv_bias: biases on query, key and value.
      out_bias: bias on the output.
      qk_norm: RMSNorm over H on queries and keys, before the rotation.
      norm_eps: of that norm.
      dropout: rate on the attention weights.
      scaled: scores are divided by sqrt(H); T5's are not, its query kernel starts smaller instead.
      init_std: of the kernels.
      out_init_std: of the output kernel; None takes init_std.
      query_init_std: of the query kernel; None takes init_std.
      positions: the encoding of positions.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scaled: bool = True
    init_std: float = 0.02
    out_init_std: float | None = None
    query_init_std: float | None = None
    positions: Positions = Positions()

    @classmethod
    def with_biases(
        cls,
        model_dim: int,
        num_heads: int,
        dropout: float,
        init_std: float,
        out_init_std: float | None = None,
        positions: Positions = Positions(),
    ) -> "AttentionConfig":
        """Heads of D / N each, as many keys as queries, biases on all four kernels: GPT's and BERT's.

        Raises:
          ValueError: if D is not a multiple of N.
        """
        if model_dim % num_heads:
            raise ValueError(f"model_dim={model_dim} is not a multiple of num_heads={num_heads}")
        return cls(
            model_dim=model_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=model_dim // num_heads,
            qkv_bias=True,
            out_bias=True,
            dropout=dropout,
            init_std=init_std,
            out_init_std=out_init_std,
            positions=positions,
        )

    def __post_init__(self) -> None:
        """Checks the head counts."""
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.positions.every_head and self.num_heads != self.num_kv_heads:
            raise ValueError(f"relative scores need num_kv_heads={self.num_kv_heads} equal to num_heads")

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return 1 / math.sqrt(self.positions.score_parts * self.head_dim) if self.scaled else 1.0


class View(struct.PyTreeNode):
    """What the queries of `Attention` look at, the same for all layers of a stack.

    Attributes:
      mask: who may look where.
      slots_BT: cache slots of the new tokens; None without a cache, and for a source.
      positions: what the encoding of positions shares among layers (`Positions.shared`).
      source_BSD: states that keys and values are made of; None takes the queries' own, or what the cache holds.
    """

    mask: Mask
    slots_BT: jax.Array | None = None
    positions: Tree = None
    source_BSD: jax.Array | None = None


class AttentionLayer(Protocol):
    """What a residual block asks of its attention: a Linen module made from (config, execution, wide)."""

    def __call__(
        self, x: Tree, view: Tree, cache: Tree, train: bool, output_attentions: bool, /
    ) -> tuple[Tree, Tree, jax.Array | None]:
        """Attends.

        Args:
          x: states `[B, T, D]`, of one stream or a tree of several.
          view: what all layers of the stack see, of the layer's own type.
          cache: what this layer remembers, of its own type; None for nothing.
          train: dropout.
          output_attentions: returns the weights.

        Returns:
          (outputs like `x`; what the layer remembers now, or None; weights `[B, N, T, S]` or None).
        """
        ...


def weigh(
    config: AttentionConfig,
    execution: Execution,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    terms: ScoreTerms,
    dropout_key: jax.Array | None,
    output_attentions: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`attend` as a layer's config and execution say: (output `[B, T, N, H]`, the weights where they are asked for)."""
    scores = dict(scale=config.scale, **terms._asdict())
    out_BTNH = attend(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask,
        implementation=execution.attention,
        kernel=execution.kernel,
        dropout_rate=config.dropout,
        dropout_key=dropout_key,
        **scores,
    )
    return out_BTNH, attention_weights(q_BTNH, k_BSKH, mask, **scores) if output_attentions else None


class Attention(nn.Module):
    """Self-attention, or cross-attention to a source, with an optional cache.

    Attributes:
      config: sizes and options.
      execution: how it runs.
      wide: in float16, the output kernel's product is in float32.
    """

    config: AttentionConfig
    execution: Execution = Execution()
    wide: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        view: View,
        cache: LayerCache | None = None,
        train: bool = False,
        output_attentions: bool = False,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Attends within `x_BTD`, or to a cache, or to a source.

        Args:
          x_BTD: the queries' states.
          view: what they look at.
          cache: with slots, `x_BTD` is written there first; without, and without a source, it is read as it is (a
            source that an earlier call has seen; each of its rows may serve several rows of `x_BTD`).
          train: dropout.
          output_attentions: returns the weights.

        Returns:
          (output `[B, T, D]`; the cache, of a source its keys and values, or None; weights `[B, N, T, S]` or None).
        """
        c, mask, cached = self.config, view.mask, cache is not None
        positions = c.positions.layer(c)

        def heads(name: str, x: jax.Array, count: int, axis: str, std: float = c.init_std) -> jax.Array:
            kernel_init = nn.initializers.normal(std)
            y = Linear(count * c.head_dim, ("embed", axis), c.qkv_bias, kernel_init, name=name)(x)
            return self.execution.constrain(y.reshape(*x.shape[:2], count, c.head_dim), ("batch", "length", axis, None))

        def placed(name: str, x_BTNH: jax.Array) -> jax.Array:
            normed = RMSNorm(c.norm_eps, name=f"{name}_norm")(x_BTNH) if c.qk_norm else x_BTNH
            return positions.rotate(normed, view.positions)

        query_std = c.init_std if c.query_init_std is None else c.query_init_std
        q_BTNH = placed("query", heads("query", x_BTD, c.num_heads, "heads", query_std))
        if cache is None or view.slots_BT is not None:
            states = x_BTD if view.source_BSD is None else view.source_BSD
            k_BSKH = placed("key", heads("key", states, c.num_kv_heads, "kv"))
            v_BSKH = heads("value", states, c.num_kv_heads, "kv")
        if cache is not None:
            cache = cache if view.slots_BT is None else cache.write(k_BSKH, v_BSKH, view.slots_BT)
            k_BSKH, v_BSKH = cache.read(q_BTNH.dtype)
        elif view.source_BSD is not None:
            cache = LayerCache.holding(k_BSKH, v_BSKH)
        q_BTNH = joined(q_BTNH, k_BSKH.shape[0])  # rows that look at one row of keys are more queries of it
        terms = positions.scores(q_BTNH, k_BSKH, mask, cached, view.positions)
        dropout_key = self.make_rng("dropout") if train and c.dropout > 0 else None
        shown: jax.Array | None
        if positions.reads_weights:
            w_BNTS = shown = attention_weights(q_BTNH, k_BSKH, mask, scale=c.scale, **terms._asdict())
            dropped = w_BNTS if dropout_key is None else drop(w_BNTS, c.dropout, dropout_key)
            w_BNTS = dropped.astype(v_BSKH.dtype)
            out_BTNH = jnp.einsum("bnts,bsnh->btnh", w_BNTS, v_BSKH) + positions.values(w_BNTS, mask, cached)
        else:
            out_BTNH, shown = weigh(
                c, self.execution, q_BTNH, k_BSKH, v_BSKH, mask, terms, dropout_key, output_attentions
            )
        out_init = nn.initializers.normal(c.init_std if c.out_init_std is None else c.out_init_std)
        dtype = weights.wide_half(x_BTD, self.wide)
        out = Linear(c.model_dim, ("heads", "embed"), c.out_bias, out_init, dtype=dtype, name="out")
        y_BTD = out(out_BTNH.reshape(*x_BTD.shape[:2], c.num_heads * c.head_dim))
        return checkpoint_name(y_BTD, "attention"), cache, shown if output_attentions else None


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Residual dropout of a Linen module, from its `dropout` stream."""
    return drop(x, rate, module.make_rng("dropout")) if train and rate > 0 else x
