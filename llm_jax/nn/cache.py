"""What decoding remembers: keys and values of earlier positions, as one pytree.

Row b holds `length_B[b]` tokens; the token at position p sits in slot `p % size`, whatever padding the prompt had,
so ragged batches need no further bookkeeping, and a full cache goes on as a sliding window, one token at a time: of
several at once the first would no longer see what the last overwrite. Passed in, returned, never mutated.
"""

import jax
import jax.numpy as jnp
from flax import struct


class LayerCache(struct.PyTreeNode):
    """Keys and values of one layer, rotary positions already applied.

    Stored `[B, K, S, H]`: attention is one product a row and head, and reads them as they lie.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def holding(cls, k_BSKH: jax.Array, v_BSKH: jax.Array) -> "LayerCache":
        """A full one, of keys and values as attention takes them."""
        return cls(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> "LayerCache":
        """Stores new entries; slot S and above drops the entry (padding)."""
        rows = jnp.arange(k_BTKH.shape[0])[:, None]
        put = lambda old, new: old.at[rows, :, slots_BT].set(new.astype(old.dtype), mode="drop", unique_indices=True)
        return LayerCache(put(self.k_BKSH, k_BTKH), put(self.v_BKSH, v_BTKH))

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, K, H]`."""
        return self.k_BKSH.swapaxes(1, 2).astype(dtype), self.v_BKSH.swapaxes(1, 2).astype(dtype)


class Cache(struct.PyTreeNode):
    """The whole model's cache.

    Attributes:
      layers: one entry a layer.
      length_B: tokens seen so far, int32.
      cross: of an encoder-decoder, one entry a layer: keys and values of the source, computed by the first call; None
        before it. They may have fewer rows than `layers`: each then serves several in a row (beams).
      source_BS: real tokens of the source, bool.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    cross: tuple[LayerCache, ...] | None = None
    source_BS: jax.Array | None = None

    @property
    def size(self) -> int:
        """S, slots per row."""
        return self.layers[0].k_BKSH.shape[2]

    def rows(self, index: jax.Array) -> "Cache":
        """The cache whose row i is this one's row `index[i]`; the source's rows stay."""
        take = lambda x: jnp.take(x, index, axis=0)
        return self.replace(layers=jax.tree.map(take, self.layers), length_B=take(self.length_B))

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
    zeros = lambda: jnp.zeros((batch, num_kv_heads, size, head_dim), dtype)
    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(num_layers))
    return Cache(layers, jnp.zeros((batch,), jnp.int32))
