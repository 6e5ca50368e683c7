"""Attention by content and relative position, of one stream or two: Transformer-XL and XLNet.

A score is `((q + u) . k + (q + v) . W r(i - j) + (q + s) . e(same segment?)) / sqrt(H)`. The first part is plain
attention, the rest a bias on it. The content stream sees what a position may see and itself; the query stream, which
predicts, has queries at chosen positions only and sees not itself. Read from left to right every token has a query in
both: one for itself, one for the position behind it.

Sources: Dai et al. 2019, section 3.3, https://arxiv.org/abs/1901.02860; Yang et al. 2019, sections 2.3 to 2.6,
https://arxiv.org/abs/1906.08237.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from llm_jax.nn import ports, weights
from llm_jax.nn.attend import Mask, attend, attention_weights
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.cache import LayerCache, joined
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.positions import sinusoid_halves
from llm_jax.nn.relative import shift


class Relations(struct.PyTreeNode):
    """Who is where and may see whom, the same for all layers.

    Attributes:
      encodings_GPD: sinusoids of the distances S, S - 1, ..., 1 - T (query minus key), of 0, 1, ..., S with a cache;
        G = 2 where rows may run backwards (forwards first), else 1.
      content: mask of the content stream, `[B, T, S]` inside.
      query: mask of the query stream, `[B, K, S]`; None without it.
      targets_BK: positions that the query stream predicts.
      differ_BTS: whether query and key are in different segments; None without segments.
      slots_BT: cache slots of the new tokens; None without a cache.
      backwards_B: rows whose text is reversed, so that a larger position is an earlier one; None where there are none.
    """

    encodings_GPD: jax.Array
    content: Mask
    query: Mask | None = None
    targets_BK: jax.Array | None = None
    differ_BTS: jax.Array | None = None
    slots_BT: jax.Array | None = None
    backwards_B: jax.Array | None = None


class PlacedCache(struct.PyTreeNode):
    """One layer's keys and values of the content, and its kernel's images of the distances 0 to S (None before a call).

    Attributes:
      content: keys and values.
      places_PNH: P = S + 1 images.
    """

    content: LayerCache
    places_PNH: jax.Array | None = None


def distance_encodings(queries: int, keys: int, features: int, clamp: int | None, backwards: bool) -> np.ndarray:
    """`[G, keys + queries, features]` float64: sines, then cosines."""
    distance = np.arange(keys, -queries, -1, dtype=np.float64)
    distance = distance if clamp is None else np.clip(distance, -clamp, clamp)
    both = [distance, -distance] if backwards else [distance]
    return np.stack([sinusoid_halves(d, features) for d in both])


class TwoStreamAttention(nn.Module):
    """Attention of one layer over both streams.

    Attributes:
      config: sizes; kernels have no biases.
      execution: how it runs.
    """

    config: AttentionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        h_BTD: jax.Array,
        g_BKD: jax.Array | None,
        memory: jax.Array | PlacedCache | None,
        relations: Relations,
        train: bool = False,
        output_attentions: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, PlacedCache | None]:
        """Attends to the memory (states of the text before, `[B, M, D]`, or a cache) and the content.

        Returns:
          (content output `[B, T, D]`, query output `[B, K, D]` or None, content weights `[B, N, T, S]` or None, the
          cache or None).
        """
        c = self.config
        init = nn.initializers.normal(c.init_std)
        linear = functools.partial(Linear, use_bias=False, kernel_init=init)
        width = c.num_heads * c.head_dim
        split = lambda x: x.reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        query, out = (
            linear(width, ("embed", "heads"), name="query"),
            linear(c.model_dim, ("heads", "embed"), name="out"),
        )
        cache = memory if isinstance(memory, PlacedCache) else None
        keys_BSD = h_BTD
        if memory is not None and not isinstance(memory, PlacedCache):
            keys_BSD = jnp.concatenate([memory.astype(h_BTD.dtype), h_BTD], axis=1)
        k_BSNH = split(linear(width, ("embed", "kv"), name="key")(keys_BSD))
        v_BSNH = split(linear(width, ("embed", "kv"), name="value")(keys_BSD))
        if cache is not None and cache.places_PNH is not None:
            r_GPNH = cache.places_PNH[None].astype(h_BTD.dtype)
        else:
            position = linear(width, ("embed", "heads"), name="position")
            r_GPNH = split(position(relations.encodings_GPD.astype(h_BTD.dtype)))
        if cache is not None:
            assert relations.slots_BT is not None
            written = cache.content.write(k_BSNH, v_BSNH, relations.slots_BT)
            k_BSNH, v_BSNH = written.read(h_BTD.dtype)
            cache = PlacedCache(written, r_GPNH[0].astype(written.k_BKSH.dtype))
        vector = lambda name: weights.parameter(self, name, init, (c.num_heads, c.head_dim), ("heads", None))
        content, place, segment = (
            vector(n).astype(h_BTD.dtype) for n in ("content_bias", "position_bias", "segment_bias")
        )
        segments = weights.parameter(self, "segments", init, (2, c.num_heads, c.head_dim), (None, "heads", None))
        segments = segments.astype(h_BTD.dtype)
        plus = lambda q, bias: q + jnp.broadcast_to(bias, q.shape)
        scale = 1 / math.sqrt(c.head_dim)
        t, s = h_BTD.shape[1], k_BSNH.shape[1]

        def look(
            x: jax.Array, mask: Mask, targets_BK: jax.Array | None, ahead: int
        ) -> tuple[jax.Array, jax.Array | None]:
            q = joined(split(query(x)), k_BSNH.shape[0])
            if relations.backwards_B is None:
                by_distance = jnp.einsum("btnh,pnh->bntp", plus(q, place), r_GPNH[0])
            else:
                r_BPNH = jnp.where(relations.backwards_B[:, None, None, None], r_GPNH[1:], r_GPNH[:1])
                by_distance = jnp.einsum("btnh,bpnh->bntp", plus(q, place), r_BPNH)
            if cache is not None:
                column = jnp.clip(mask.distance() + ahead, 0, r_GPNH.shape[1] - 1)
                bias = jnp.take_along_axis(by_distance, column[:, None], axis=-1)
            elif targets_BK is None:
                bias = shift(by_distance, s)
            else:
                column = t - targets_BK[:, :, None] + jnp.arange(s)[None, None, :]
                bias = jnp.take_along_axis(by_distance, column[:, None], axis=-1)
            if relations.differ_BTS is not None:
                differ = relations.differ_BTS
                if targets_BK is not None:
                    differ = jnp.take_along_axis(differ, targets_BK[:, :, None], axis=1)
                same_or_not = jnp.einsum("btnh,enh->bnte", plus(q, segment), segments)
                same, other = same_or_not[..., :1], same_or_not[..., 1:]
                bias = bias + jnp.where(differ[:, None], other, same)
            q, bias = plus(q, content), weights.scaled(bias, scale)
            y = attend(
                *(q, k_BSNH, v_BSNH, mask),
                scale=scale,
                implementation=self.execution.attention,
                bias_BNTS=bias,
                dropout_rate=c.dropout,
                dropout_key=self.make_rng("dropout") if train and c.dropout > 0 else None,
            )
            shown = attention_weights(q, k_BSNH, mask, scale=scale, bias_BNTS=bias) if output_attentions else None
            y = ports.sequential(self, "adapter", out(y.reshape(*x.shape[:2], width)))
            return ports.parallel(self, "parallel_adapter", x, y), shown

        h, shown = look(h_BTD, relations.content, None, 0)
        g = None
        if g_BKD is not None and relations.query is not None:
            g, _ = look(g_BKD, relations.query, relations.targets_BK, 1)
        return h, g, shown, cache
