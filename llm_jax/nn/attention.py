"""The attention layer: multi-head and grouped-query, of one sequence or to a source, with an optional cache.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 (grouped queries),
https://arxiv.org/abs/2305.13245.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import ports, positions, weights
from llm_jax.nn.attend import Mask, attend, attention_weights, drop
from llm_jax.nn.cache import LayerCache, joined
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import RMSNorm
from llm_jax.nn.relative_scores import RelativeConfig, RelativeScores


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
      alibi: scores fall linearly with the distance.
      relative: scores between content and distance; needs as many key heads as query heads.
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
    alibi: bool = False
    relative: RelativeConfig | None = None

    @classmethod
    def with_biases(
        cls, model_dim: int, num_heads: int, dropout: float, init_std: float, out_init_std: float | None = None
    ) -> "AttentionConfig":
        """Heads of D / N each, as many keys as queries, biases on all four kernels: GPT's and BERT's.

        Raises:
          ValueError: if D is no multiple of N.
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
        )

    def __post_init__(self) -> None:
        """Checks the head counts."""
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.relative is not None and self.num_heads != self.num_kv_heads:
            raise ValueError(f"relative scores need num_kv_heads={self.num_kv_heads} equal to num_heads")

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        parts = 3 if self.relative is not None and self.relative.kind == "deberta" else 1
        return 1 / math.sqrt(parts * self.head_dim) if self.scaled else 1.0


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
        mask: Mask,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        cache: LayerCache | None = None,
        slots_BT: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        bias_BNTS: jax.Array | None = None,
        source_BSD: jax.Array | None = None,
        distances_PD: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Attends within `x_BTD`, or to a cache, or to a source.

        Args:
          x_BTD: the queries' states.
          mask: who may look where.
          rotary: tables of `positions.rotary_tables`.
          cache: with `slots_BT`, `x_BTD` is written there first; without, and without a source, it is read as it is
            (a source that an earlier call has seen; each of its rows may serve several rows of `x_BTD`).
          slots_BT: where.
          train: dropout.
          output_attentions: returns the weights.
          bias_BNTS: added to the scores, B or 1 rows.
          source_BSD: states that keys and values are made of; `x_BTD` itself by default.
          distances_PD: table of distances that all layers share (DeBERTa).

        Returns:
          (output `[B, T, D]`; the cache, of a source its keys and values, or None; weights `[B, N, T, S]` or None).
        """
        c, constrain = self.config, self.execution.constrain
        b, t, _ = x_BTD.shape

        def heads(name, count, axis, x, std=c.init_std):
            kernel_init = nn.initializers.normal(std)
            y = Linear(count * c.head_dim, ("embed", axis), c.qkv_bias, kernel_init, name=name)(x)
            y = constrain(y.reshape(*x.shape[:2], count, c.head_dim), ("batch", "length", axis, None))
            if c.qk_norm and name != "value":
                y = RMSNorm(c.norm_eps, name=f"{name}_norm")(y)
            return positions.rotate(y, rotary) if rotary is not None and name != "value" else y

        query_std = c.init_std if c.query_init_std is None else c.query_init_std
        q_BTNH = heads("query", c.num_heads, "heads", x_BTD, query_std)
        if cache is None or slots_BT is not None:
            states = x_BTD if source_BSD is None else source_BSD
            k_BSKH = heads("key", c.num_kv_heads, "kv", states)
            v_BSKH = heads("value", c.num_kv_heads, "kv", states)
        if cache is not None:
            cache = cache if slots_BT is None else cache.write(k_BSKH, v_BSKH, slots_BT)
            k_BSKH, v_BSKH = cache.read(q_BTNH.dtype)
        elif source_BSD is not None:
            cache = LayerCache.holding(k_BSKH, v_BSKH)
        q_BTNH = joined(q_BTNH, k_BSKH.shape[0])  # rows that look at one row of keys are more queries of it
        places, cached = None, cache is not None
        if c.relative is not None:
            places = RelativeScores(c.relative, c.num_heads, c.head_dim, c.init_std, name="relative")
            by_place = places(q_BTNH, k_BSKH, mask, cached, distances_PD) * c.scale
            bias_BNTS = by_place if bias_BNTS is None else by_place + bias_BNTS
        slopes_N = jnp.asarray(positions.alibi_slopes(c.num_heads)) if c.alibi else None
        scores: dict[str, Any] = dict(scale=c.scale, slopes_N=slopes_N, bias_BNTS=bias_BNTS)
        dropout_key = self.make_rng("dropout") if train and c.dropout > 0 else None
        shown = None
        if places is not None and places.config.kind == "shaw":  # whose values need the weights
            w_BNTS = shown = attention_weights(q_BTNH, k_BSKH, mask, **scores)
            w_BNTS = w_BNTS if dropout_key is None else drop(w_BNTS, c.dropout, dropout_key)
            w_BNTS = w_BNTS.astype(v_BSKH.dtype)
            out_BTNH = jnp.einsum("bnts,bsnh->btnh", w_BNTS, v_BSKH) + places.gained(w_BNTS, mask, cached)
        else:
            out_BTNH = attend(
                *(q_BTNH, k_BSKH, v_BSKH, mask),
                implementation=self.execution.attention,
                kernel=self.execution.kernel,
                dropout_rate=c.dropout,
                dropout_key=dropout_key,
                **scores,
            )
        if output_attentions and shown is None:
            shown = attention_weights(q_BTNH, k_BSKH, mask, **scores)
        out_init = nn.initializers.normal(c.init_std if c.out_init_std is None else c.out_init_std)
        dtype = weights.wide_half(x_BTD, self.wide)
        y_BTD = Linear(c.model_dim, ("heads", "embed"), c.out_bias, out_init, dtype=dtype, name="out")(
            out_BTNH.reshape(b, t, c.num_heads * c.head_dim)
        )
        y_BTD = ports.sequential(self, "adapter", checkpoint_name(y_BTD, "attention"))
        return ports.parallel(self, "parallel_adapter", x_BTD, y_BTD), cache, shown if output_attentions else None


def dropout(module: Any, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Residual dropout of a Linen module, from its `dropout` stream."""
    return drop(x, rate, module.make_rng("dropout")) if train and rate > 0 else x
