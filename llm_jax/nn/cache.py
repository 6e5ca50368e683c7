"""What decoding remembers: keys and values of earlier positions, as one pytree.

Row b holds `length_B[b]` tokens; the token at position p sits in slot `p % size`, whatever padding the prompt had,
so ragged batches need no further bookkeeping, and a full cache goes on as a sliding window. Passed in, returned,
never mutated.
"""

import jax
import jax.numpy as jnp
from flax import struct


class LayerCache(struct.PyTreeNode):
    """Keys and values of one layer, `[B, S, K, H]`, rotary positions already applied."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> "LayerCache":
        """Stores new entries; slot S and above drops the entry (padding)."""
        rows = jnp.arange(k_BTKH.shape[0])[:, None]
        put = lambda old, new: old.at[rows, slots_BT].set(new.astype(old.dtype), mode="drop", unique_indices=True)
        return LayerCache(put(self.k_BSKH, k_BTKH), put(self.v_BSKH, v_BTKH))


class Cache(struct.PyTreeNode):
    """The whole model's cache.

    Attributes:
      layers: one entry a layer.
      length_B: tokens seen so far, int32.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def size(self) -> int:
        """S, slots per row."""
        return self.layers[0].k_BSKH.shape[1]

    def positions_of(self, mask_BT: jax.Array) -> jax.Array:
        """Positions of the next tokens; where the mask is false the value is meaningless."""
        return self.length_B[:, None] + jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1

    def key_positions(self, length_B: jax.Array) -> jax.Array:
        """`[B, S]`: the position held by each slot once a row has `length_B` tokens; negative where empty."""
        last = length_B[:, None] - 1
        return last - (last - jnp.arange(self.size, dtype=jnp.int32)[None, :]) % self.size


def init_cache(
    num_layers: int, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """An empty cache: 2 * L * B * S * K * H numbers."""
    zeros = lambda: jnp.zeros((batch, size, num_kv_heads, head_dim), dtype)
    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(num_layers))
    return Cache(layers, jnp.zeros((batch,), jnp.int32))
