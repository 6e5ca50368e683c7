"""Attention by content and relative position, of one stream or two: Transformer-XL and XLNet.

A score is `((q + u) . k + (q + v) . W r(i - j) + (q + s) . e(same segment?)) / sqrt(H)`. The first part is plain
attention, the rest a bias on it. The content stream sees what a position may see and itself; the query stream, which
predicts, has queries at chosen positions only and sees not itself. Read from left to right every token has a query in
both: one for itself, one for the position behind it.

Sources: Dai et al. 2019, section 3.3, https://arxiv.org/abs/1901.02860; Yang et al. 2019, sections 2.3 to 2.6,
https://arxiv.org/abs/1906.08237.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import AttentionConfig, ScoreTerms, weigh
from llm_jax.nn.cache import LayerCache, joined
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.relations import Relations
from llm_jax.nn.relative import shift


class PlacedCache(struct.PyTreeNode):
    """What one layer remembers: keys and values of the content, and images of the distances 0 to S.

    Attributes:
      content: keys and values of the content stream.
      images_PNH: the position kernel's images of the P = S + 1 distances; None before the first call.
    """

    content: LayerCache
    images_PNH: jax.Array | None = None


class TwoStreamAttention(nn.Module):
    """Attention of one layer over both streams: an `AttentionLayer`.

    Attributes:
      config: sizes; kernels have no biases.
      execution: how it runs.
      wide: in float16, the output kernel's product is in float32.
    """

    config: AttentionConfig
    execution: Execution = Execution()
    wide: bool = False

    @nn.compact
    def __call__(
        self,
        streams: tuple[jax.Array, jax.Array | None],
        relations: Relations,
        memory: jax.Array | PlacedCache | None = None,
        train: bool = False,
        output_attentions: bool = False,
    ) -> tuple[tuple[jax.Array, jax.Array | None], PlacedCache | None, jax.Array | None]:
        """Attends to the memory and the content.

        Args:
          streams: content `[B, T, D]`, and queries `[B, K, D]` or None.
          relations: who is where and may see whom.
          memory: states of the text before `[B, M, D]`, or a cache.
          train: dropout.
          output_attentions: returns the content's weights.

        Returns:
          (outputs of both streams, the cache or None, the content's weights `[B, N, T, S]` or None).
        """
        c, (h_BTD, g_BKD), n, h = self.config, streams, self.config.num_heads, self.config.head_dim
        dtype = h_BTD.dtype
        init = nn.initializers.normal(c.init_std)

        def linear(name: str, axis: str) -> Linear:
            return Linear(n * h, ("embed", axis), False, init, name=name)

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], n, h)

        def vectors(name: str, *count: int) -> jax.Array:
            axes = (*(None for _ in count), "heads", None)
            return weights.parameter(self, name, init, (*count, n, h), axes).astype(dtype)

        query = linear("query", "heads")
        out_dtype = weights.wide_half(h_BTD, self.wide)
        out = Linear(c.model_dim, ("heads", "embed"), False, init, dtype=out_dtype, name="out")
        cache, keys_BSD = None, h_BTD
        if isinstance(memory, PlacedCache):
            cache = memory
        elif memory is not None:
            keys_BSD = jnp.concatenate([memory.astype(dtype), h_BTD], axis=1)
        k_BSNH = split(linear("key", "kv")(keys_BSD))
        v_BSNH = split(linear("value", "kv")(keys_BSD))
        if cache is not None and cache.images_PNH is not None:
            r_GPNH = cache.images_PNH[None].astype(dtype)
        else:
            r_GPNH = split(linear("position", "heads")(relations.encodings_GPD.astype(dtype)))
        if cache is not None:
            assert relations.slots_BT is not None
            written = cache.content.write(k_BSNH, v_BSNH, relations.slots_BT)
            k_BSNH, v_BSNH = written.read(dtype)
            cache = PlacedCache(written, r_GPNH[0].astype(written.k_BKSH.dtype))
        content_NH, position_NH, segment_NH = (vectors(f"{n}_bias") for n in ("content", "position", "segment"))
        segments_2NH = vectors("segments", 2)

        def look(
            x: jax.Array, mask: Mask, targets_BK: jax.Array | None, ahead: int
        ) -> tuple[jax.Array, jax.Array | None]:
            """Attention of one stream, whose queries stand `ahead` of the positions that its mask names."""
            q = joined(split(query(x)), k_BSNH.shape[0])
            by_distance = _by_distance(plus(q, position_NH), r_GPNH, relations.backwards_B)
            if cache is None:
                bias_BNTS = _of_keys(by_distance, h_BTD.shape[1], k_BSNH.shape[1], targets_BK)
            else:
                column = jnp.clip(mask.distance() + ahead, 0, r_GPNH.shape[1] - 1)
                bias_BNTS = jnp.take_along_axis(by_distance, column[:, None], axis=-1)
            if relations.differ_BTS is not None:
                bias_BNTS = bias_BNTS + _by_segment(plus(q, segment_NH), segments_2NH, relations.differ_BTS, targets_BK)
            q, terms = plus(q, content_NH), ScoreTerms(bias_BNTS=weights.scaled(bias_BNTS, c.scale))
            key = self.make_rng("dropout") if train and c.dropout > 0 else None
            y, shown = weigh(c, self.execution, q, k_BSNH, v_BSNH, mask, terms, key, output_attentions)
            return checkpoint_name(out(y.reshape(*x.shape[:2], n * h)), "attention"), shown

        content, shown = look(h_BTD, relations.content, None, 0)
        queries = None
        if g_BKD is not None and relations.query is not None:
            queries, _ = look(g_BKD, relations.query, relations.targets_BK, 1)
        return (content, queries), cache, shown


def plus(q_BTNH: jax.Array, bias_NH: jax.Array) -> jax.Array:
    """Adds one vector per head to the queries."""
    return q_BTNH + jnp.broadcast_to(bias_NH, q_BTNH.shape)


def _by_distance(q_BTNH: jax.Array, r_GPNH: jax.Array, backwards_B: jax.Array | None) -> jax.Array:
    """`[B, N, T, P]`: products of queries with the images of distances, in each row's direction."""
    if backwards_B is None:
        return jnp.einsum("btnh,pnh->bntp", q_BTNH, r_GPNH[0])
    r_BPNH = jnp.where(backwards_B[:, None, None, None], r_GPNH[1:], r_GPNH[:1])
    return jnp.einsum("btnh,bpnh->bntp", q_BTNH, r_BPNH)


def _of_keys(x_BNTP: jax.Array, length: int, keys: int, targets_BK: jax.Array | None) -> jax.Array:
    """`[B, N, T, S]`: for every key the column of its distance to the query, or to the target of the query."""
    if targets_BK is None:
        return shift(x_BNTP, keys)
    column = length - targets_BK[:, :, None] + jnp.arange(keys)[None, None, :]
    return jnp.take_along_axis(x_BNTP, column[:, None], axis=-1)


def _by_segment(
    q_BTNH: jax.Array, segments_2NH: jax.Array, differ_BTS: jax.Array, targets_BK: jax.Array | None
) -> jax.Array:
    """`[B, N, T, S]`: products of queries with the vector of keys in the same segment, or in others."""
    if targets_BK is not None:
        differ_BTS = jnp.take_along_axis(differ_BTS, targets_BK[:, :, None], axis=1)
    same_or_not = jnp.einsum("btnh,enh->bnte", q_BTNH, segments_2NH)
    return jnp.where(differ_BTS[:, None], same_or_not[..., 1:], same_or_not[..., :1])
