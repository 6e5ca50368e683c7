"""Scores between content and distance, which attention adds to those between content and content.

- `shaw`: a vector a clipped distance, `q . a(i - j)`, and one that values gain; shared by the heads of a layer.
- `xlnet`: `(q + v) . W r(i - j) + u . k` with sinusoids r, vectors u and v (`nn.two_stream` has both streams).
- `deberta`: `q . W_k p(i - j) + k . W_q p(i - j)` with a table p that all layers share; all three scores are divided
  by sqrt(3 H). So its code and its checkpoints have it; the paper prints p(j - i) in the second product.

Sources: Shaw et al. 2018, https://arxiv.org/abs/1803.02155; Dai et al. 2019, section 3.3,
https://arxiv.org/abs/1901.02860; He et al. 2021, section 3.1, https://arxiv.org/abs/2006.03654.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.linear import Linear
from llm_jax.nn.positions import sinusoid_halves
from llm_jax.nn.relative import shift

KINDS = ("shaw", "xlnet", "deberta")


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
    """Which scores.

    Attributes:
      kind: `shaw`, `xlnet` or `deberta`.
      max_distance: m; Shaw's and DeBERTa's distances are clipped to it.
    """

    kind: str
    max_distance: int = 128

    def __post_init__(self) -> None:
        """Checks the kind and the range."""
        if self.kind not in KINDS:
            raise ValueError(f"relative kind={self.kind!r} is none of {', '.join(KINDS)}")
        if self.max_distance < 1:
            raise ValueError(f"max_distance={self.max_distance} must be at least 1")


def _rows(config: RelativeConfig, table_PD: jax.Array, distance: jax.Array | np.ndarray) -> jax.Array:
    """A table's rows for distances: row d + m holds distance d, from -m on."""
    m = config.max_distance
    return weights.take(table_PD, jnp.clip(jnp.asarray(distance) + m, 0, table_PD.shape[0] - 1))


def against(
    x_BTNH: jax.Array, encode: Callable[[np.ndarray], jax.Array], mask: Mask, cached: bool, sign: int = 1
) -> jax.Array:
    """Products of queries with the encodings of their distances to keys (`sign=-1`: of keys with theirs to queries).

    Args:
      x_BTNH: queries, or keys.
      encode: `[P]` distances to `[P, N, H]`.
      mask: says the distances.
      cached: keys lie where a cache has put them, behind no query; else slot i is position i.
      sign: 1 for `[B, N, T, S]` from queries, -1 from keys, turned round to the same shape.
    """
    t, s = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    if not cached:
        own, others = (t, s) if sign == 1 else (s, t)
        r_PNH = encode(np.arange(others, -own, -1))
        out = shift(jnp.einsum("btnh,pnh->bntp", x_BTNH, r_PNH), others)
    else:
        r_PNH = encode(sign * np.arange(s + t))
        by_distance = jnp.einsum("btnh,pnh->bntp", x_BTNH, r_PNH)
        d = jnp.clip(mask.distance(), 0, s + t - 1)
        d = d if sign == 1 else d.swapaxes(1, 2)
        out = jnp.take_along_axis(by_distance, d[:, None], axis=-1)
    return out if sign == 1 else out.swapaxes(2, 3)


class RelativeScores(nn.Module):
    """What one layer adds to its scores.

    Attributes:
      config: which.
      num_heads: N, of queries and keys.
      head_dim: H.
      init_std: of the kernels and vectors.
    """

    config: RelativeConfig
    num_heads: int
    head_dim: int
    init_std: float = 0.02

    def setup(self) -> None:
        """Declares the parameters of the kind."""
        n, h, kind = self.num_heads, self.head_dim, self.config.kind
        init = nn.initializers.normal(self.init_std)
        linear = lambda name: Linear(n * h, ("embed", "heads"), False, init, name=name)
        if kind == "shaw":
            table = lambda name: weights.parameter(
                self, name, init, (2 * self.config.max_distance + 1, h), (None, None)
            )
            self.keys, self.values = table("keys"), table("values")
        elif kind == "xlnet":
            vector = lambda name: weights.parameter(self, name, init, (n, h), ("heads", None))
            self.content, self.place = vector("content_bias"), vector("position_bias")
            self.position = linear("position")
        else:
            self.position_key, self.position_query = linear("position_key"), linear("position_query")

    def _split(self, x_PX: jax.Array) -> jax.Array:
        return x_PX.reshape(x_PX.shape[0], self.num_heads, self.head_dim)

    def __call__(
        self, q_BTNH: jax.Array, k_BSNH: jax.Array, mask: Mask, cached: bool, table_PD: jax.Array | None = None
    ) -> jax.Array:
        """`[B, N, T, S]`, not scaled.

        Args:
          q_BTNH: queries.
          k_BSNH: keys, as many heads.
          mask: says the distances.
          cached: see `against`.
          table_PD: DeBERTa's table, `[2 m, D]`.
        """
        c, dtype = self.config, q_BTNH.dtype
        if c.kind == "shaw":
            one = lambda d: _rows(c, self.keys.astype(dtype), d)[:, None]
            encode = lambda d: jnp.broadcast_to(one(d), (len(d), self.num_heads, self.head_dim))
            return against(q_BTNH, encode, mask, cached)
        if c.kind == "xlnet":
            width = self.num_heads * self.head_dim
            encode = lambda d: self._split(self.position(jnp.asarray(sinusoid_halves(d, width), dtype)))
            plus = q_BTNH + jnp.broadcast_to(self.place.astype(dtype), q_BTNH.shape)
            content = jnp.einsum("nh,bsnh->bns", self.content.astype(dtype), k_BSNH)
            by_place = against(plus, encode, mask, cached)
            return by_place + jnp.broadcast_to(content[:, :, None], by_place.shape)
        assert table_PD is not None
        keys, queries = (project(table_PD.astype(dtype)) for project in (self.position_key, self.position_query))
        content_to_position = against(q_BTNH, lambda d: self._split(_rows(c, keys, d)), mask, cached)
        of_queries = lambda d: self._split(_rows(c, queries, -d))
        return content_to_position + against(k_BSNH, of_queries, mask, cached, sign=-1)

    def gained(self, w_BNTS: jax.Array, mask: Mask, cached: bool) -> jax.Array:
        """`[B, T, N, H]`: what Shaw's values add to the output, from the attention weights."""
        c, (b, n, t, s) = self.config, w_BNTS.shape
        table = self.values.astype(w_BNTS.dtype)
        if cached:
            return jnp.einsum("bnts,btsh->btnh", w_BNTS, _rows(c, table, mask.distance()))
        shape = jax.ShapeDtypeStruct((b, n, t, s + t), w_BNTS.dtype)
        (by_distance,) = jax.linear_transpose(lambda x: shift(x, s), shape)(w_BNTS)
        return jnp.einsum("bntp,ph->btnh", by_distance, _rows(c, table, np.arange(s, -t, -1)))
