"""Relative positions as a bias on attention scores, one number a head and bucket of distances.

Source: Raffel et al. 2020, section 2.1 (T5), https://arxiv.org/abs/1910.10683.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import AttentionConfig, Positions, ScoreTerms


def bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """`[max_distance + 1]` int32: the bucket of every distance: one each for the near ones, then logarithmic ones."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1, dtype=np.float32)
    share = np.log(np.maximum(distance, 1) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (share * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def distances(mask: Mask, cached: bool) -> jax.Array:
    """Query position minus key position: `[B, T, S]` from a cache; else slots count and one row says it for all."""
    if cached:
        return mask.distance()
    t, s = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    return (jnp.arange(t)[:, None] - jnp.arange(s)[None, :])[None]


def shift(x_BNTP: jax.Array, keys: int) -> jax.Array:
    """Entry (i, j) from column T - i + j, which holds distance i - j, with i counted behind S - T older keys."""
    b, n, t, p = x_BNTP.shape
    return x_BNTP.reshape(b, n, p, t)[:, :, 1:].reshape(b, n, t, p - 1)[..., :keys]


class RelativeBias(nn.Module):
    """The bias of T5, which all layers of a stack share.

    Attributes:
      num_heads: N.
      num_buckets: half of them for keys behind the query where it sees those.
      max_distance: distances from here on share a bucket.
      bidirectional: whether a query sees what is behind it.
      init_std: of the table.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, distance_BTS: jax.Array) -> jax.Array:
        """`[B, N, T, S]` from query position minus key position."""
        init = nn.initializers.normal(self.init_std)
        table = weights.parameter(self, "embedding", init, (self.num_buckets, self.num_heads), (None, "heads"))
        one_sided = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        far = distance_BTS if not self.bidirectional else jnp.abs(distance_BTS)
        bucket = jnp.asarray(bucket_table(one_sided, self.max_distance))[jnp.clip(far, 0, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + jnp.where(distance_BTS < 0, one_sided, 0)
        return weights.take(table, bucket).transpose(0, 3, 1, 2)


class Bias(struct.PyTreeNode):
    """The bias that all layers of a stack share, computed once."""

    bias_BNTS: jax.Array


@dataclasses.dataclass(frozen=True)
class Buckets(Positions):
    """T5's bias, one for all layers of a stack.

    Attributes:
      num_buckets: see `RelativeBias`.
      max_distance: see `RelativeBias`.
      bidirectional: see `RelativeBias`.
      name: the table's, among the model's parameters.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    name: str = "positions"

    def shared(
        self, config: AttentionConfig, positions_BT: jax.Array, mask: Mask, cached: bool, dtype: jnp.dtype
    ) -> Bias:
        """See `Positions`."""
        del positions_BT, dtype
        table = RelativeBias(
            num_heads=config.num_heads,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
            init_std=config.init_std,
            name=self.name,
        )
        return Bias(table(distances(mask, cached)))

    def scores(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, cached: bool, shared: Bias) -> ScoreTerms:
        """See `LayerPositions`."""
        del q_BTNH, k_BSKH, mask, cached
        return ScoreTerms(bias_BNTS=shared.bias_BNTS)
