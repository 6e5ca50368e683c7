"""Scores between content and distance, which attention adds to those between content and content.

- `Shaw`: a vector a clipped distance, `q . a(i - j)`, and one that values gain; shared by the heads of a layer.
- `TransformerXL`: `(q + v) . W r(i - j) + u . k` with sinusoids r, vectors u and v (`nn.two_stream` has both streams).
- `Deberta`: `q . W_k p(i - j) + k . W_q p(i - j)` with a table p that all layers share; all three scores are divided
  by sqrt(3 H). So its code and its checkpoints have it; the paper prints p(j - i) in the second product.

Sources: Shaw et al. 2018, https://arxiv.org/abs/1803.02155; Dai et al. 2019, section 3.3,
https://arxiv.org/abs/1901.02860; He et al. 2021, section 3.1, https://arxiv.org/abs/2006.03654.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import AttentionConfig, LayerPositions, Positions, ScoreTerms
from llm_jax.nn.linear import Linear
from llm_jax.nn.positions import sinusoid_halves, table
from llm_jax.nn.protocols import Tree
from llm_jax.nn.relative import shift


def rows(table_PD: jax.Array, distance: jax.Array | np.ndarray, most: int) -> jax.Array:
    """A table's rows for distances clipped to `most`: row d + most holds distance d."""
    return weights.take(table_PD, jnp.clip(jnp.asarray(distance) + most, 0, table_PD.shape[0] - 1))


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
        here, there = (t, s) if sign == 1 else (s, t)
        r_PNH = encode(np.arange(there, -here, -1))
        out = shift(jnp.einsum("btnh,pnh->bntp", x_BTNH, r_PNH), there)
    else:
        r_PNH = encode(sign * np.arange(s + t))
        by_distance = jnp.einsum("btnh,pnh->bntp", x_BTNH, r_PNH)
        d = jnp.clip(mask.distance(), 0, s + t - 1)
        d = d if sign == 1 else d.swapaxes(1, 2)
        out = jnp.take_along_axis(by_distance, d[:, None], axis=-1)
    return out if sign == 1 else out.swapaxes(2, 3)


class RelativeScores(nn.Module):
    """What one layer adds to its scores: a `LayerPositions`, whose subclasses define `__call__`.

    Attributes:
      config: sizes of the attention.
      max_distance: where distances are clipped.
    """

    config: AttentionConfig
    max_distance: int = 128

    reads_weights: ClassVar[bool] = False

    def __call__(self, q_BTNH: jax.Array, k_BSNH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> jax.Array:
        """`[B, N, T, S]`, not scaled."""
        raise TypeError(f"{type(self).__name__} does not say what it adds to scores: define __call__")

    def rotate(self, x_BTNH: jax.Array, shared: Tree) -> jax.Array:
        """See `LayerPositions`."""
        del shared
        return x_BTNH

    def scores(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> ScoreTerms:
        """See `LayerPositions`."""
        return ScoreTerms(bias_BNTS=self(q_BTNH, k_BSKH, mask, cached, shared) * self.config.scale)

    def values(self, w_BNTS: jax.Array, mask: Mask, cached: bool) -> jax.Array:
        """See `LayerPositions`."""
        raise TypeError(f"{type(self).__name__} adds nothing to values")

    def linear(self, name: str) -> Linear:
        """A kernel from D to the heads."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return Linear(c.num_heads * c.head_dim, ("embed", "heads"), False, init, name=name)

    def split(self, x_PX: jax.Array) -> jax.Array:
        """`[P, N * H]` to `[P, N, H]`."""
        return x_PX.reshape(x_PX.shape[0], self.config.num_heads, self.config.head_dim)


class ShawScores(RelativeScores):
    """A vector a distance for keys and one for values, the same for all heads."""

    reads_weights: ClassVar[bool] = True

    def setup(self) -> None:
        """Declares both tables."""
        init = nn.initializers.normal(self.config.init_std)
        shape = (2 * self.max_distance + 1, self.config.head_dim)
        self.keys = weights.parameter(self, "keys", init, shape, (None, None))
        self.gains = weights.parameter(self, "values", init, shape, (None, None))

    def __call__(self, q_BTNH: jax.Array, k_BSNH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> jax.Array:
        """`q . a(i - j)`."""
        del k_BSNH, shared
        keys_PH, heads = self.keys.astype(q_BTNH.dtype), q_BTNH.shape[2:]

        def encode(distance: np.ndarray) -> jax.Array:
            return jnp.broadcast_to(rows(keys_PH, distance, self.max_distance)[:, None], (len(distance), *heads))

        return against(q_BTNH, encode, mask, cached)

    def values(self, w_BNTS: jax.Array, mask: Mask, cached: bool) -> jax.Array:
        """See `LayerPositions`."""
        b, n, t, s = w_BNTS.shape
        table_PH = self.gains.astype(w_BNTS.dtype)
        if cached:
            return jnp.einsum("bnts,btsh->btnh", w_BNTS, rows(table_PH, mask.distance(), self.max_distance))
        shape = jax.ShapeDtypeStruct((b, n, t, s + t), w_BNTS.dtype)
        (by_distance,) = jax.linear_transpose(lambda x: shift(x, s), shape)(w_BNTS)
        distances = np.arange(s, -t, -1)
        return jnp.einsum("bntp,ph->btnh", by_distance, rows(table_PH, distances, self.max_distance))


class TransformerXLScores(RelativeScores):
    """Sinusoids through a kernel, and a vector a head for each of content and position."""

    def setup(self) -> None:
        """Declares the vectors and the kernel."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        shape, axes = (c.num_heads, c.head_dim), ("heads", None)
        self.content = weights.parameter(self, "content_bias", init, shape, axes)
        self.place = weights.parameter(self, "position_bias", init, shape, axes)
        self.position = self.linear("position")

    def __call__(self, q_BTNH: jax.Array, k_BSNH: jax.Array, mask: Mask, cached: bool, shared: Tree) -> jax.Array:
        """`(q + v) . W r(i - j) + u . k`."""
        del shared
        dtype, width = q_BTNH.dtype, self.config.num_heads * self.config.head_dim

        def encode(distance: np.ndarray) -> jax.Array:
            return self.split(self.position(jnp.asarray(sinusoid_halves(distance, width), dtype)))

        plus = q_BTNH + jnp.broadcast_to(self.place.astype(dtype), q_BTNH.shape)
        content = jnp.einsum("nh,bsnh->bns", self.content.astype(dtype), k_BSNH)
        by_position = against(plus, encode, mask, cached)
        return by_position + jnp.broadcast_to(content[:, :, None], by_position.shape)


class DebertaScores(RelativeScores):
    """A table of distances that all layers share, through a kernel for keys and one for queries."""

    def setup(self) -> None:
        """Declares the kernels."""
        self.position_key, self.position_query = self.linear("position_key"), self.linear("position_query")

    def __call__(
        self, q_BTNH: jax.Array, k_BSNH: jax.Array, mask: Mask, cached: bool, shared: "Distances"
    ) -> jax.Array:
        """`q . W_k p(i - j) + k . W_q p(i - j)`."""
        table_PD = shared.table_PD.astype(q_BTNH.dtype)
        keys_PX, queries_PX = self.position_key(table_PD), self.position_query(table_PD)

        def key_of(distance: np.ndarray) -> jax.Array:
            return self.split(rows(keys_PX, distance, self.max_distance))

        def query_of(distance: np.ndarray) -> jax.Array:
            return self.split(rows(queries_PX, -distance, self.max_distance))

        content_to_position = against(q_BTNH, key_of, mask, cached)
        return content_to_position + against(k_BSNH, query_of, mask, cached, sign=-1)


@dataclasses.dataclass(frozen=True)
class Shaw(Positions):
    """Shaw's scores and values.

    Attributes:
      max_distance: m; distances are clipped to it.
    """

    max_distance: int = 128

    every_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the range."""
        _check_range(self.max_distance)

    def layer(self, config: AttentionConfig) -> LayerPositions:
        """See `Positions`."""
        return ShawScores(config, self.max_distance, name="relative")


@dataclasses.dataclass(frozen=True)
class TransformerXL(Positions):
    """Transformer-XL's scores, of one stream."""

    every_head: ClassVar[bool] = True

    def layer(self, config: AttentionConfig) -> LayerPositions:
        """See `Positions`."""
        return TransformerXLScores(config, name="relative")


class Distances(struct.PyTreeNode):
    """What `Deberta` shares among layers: a row for each of the distances -m to m - 1."""

    without_rows: ClassVar[tuple[str, ...]] = ("table_PD",)  # all other arrays lead with rows, or with one

    table_PD: jax.Array


@dataclasses.dataclass(frozen=True)
class Deberta(Positions):
    """DeBERTa's scores, between content and distance in both directions.

    Attributes:
      max_distance: m; distances are clipped to -m and m - 1.
    """

    max_distance: int = 128

    score_parts: ClassVar[int] = 3
    every_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the range."""
        _check_range(self.max_distance)

    def shared(
        self, config: AttentionConfig, positions_BT: jax.Array, mask: Mask, cached: bool, dtype: jnp.dtype
    ) -> Distances:
        """See `Positions`."""
        del positions_BT, mask, cached
        count = 2 * self.max_distance
        return Distances(table(config, count, config.model_dim)(jnp.arange(count), dtype))

    def layer(self, config: AttentionConfig) -> LayerPositions:
        """See `Positions`."""
        return DebertaScores(config, self.max_distance, name="relative")


def _check_range(max_distance: int) -> None:
    if max_distance < 1:
        raise ValueError(f"max_distance={max_distance} must be at least 1")
