"""What decoding remembers: keys and values of earlier positions, as one pytree.

Row b holds `length_B[b]` tokens; the token at position p sits in slot `p % size`, whatever padding the prompt had,
so ragged batches need no further bookkeeping, and a full cache continues as a sliding window, one token at a time:
of several at once the first would no longer see what the last overwrite. Passed in, returned, never mutated.

The W beams of a search share a row: each has a region of S slots of its own, where it writes, and a table says in whose
region the token at each of its positions lies. So beams that change places copy nothing but the table: attention sees
all regions and hides what is another's.
"""

import jax
import jax.numpy as jnp
from flax import struct


def joined(x_RT: jax.Array, rows: int) -> jax.Array:
    """Consecutive rows as one: `[R, T, ...]` to `[rows, R / rows * T, ...]`."""
    return x_RT.reshape(rows, -1, *x_RT.shape[2:])


class LayerCache(struct.PyTreeNode):
    """Keys and values of one layer, rotary positions already applied.

    Stored `[B, K, S, H]`: attention is one product a row and head, and reads them as they lie.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def holding(cls, k_BSKH: jax.Array, v_BSKH: jax.Array) -> "LayerCache":
        """A full cache from keys and values as attention takes them."""
        return cls(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> "LayerCache":
        """Stores new entries, of beams several rows in a row; a slot behind the last drops the entry (padding)."""
        count = self.k_BKSH.shape[0]
        rows, slots = jnp.arange(count)[:, None], joined(slots_BT, count)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            new = joined(new, count).astype(old.dtype)
            return old.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

        return LayerCache(put(self.k_BKSH, k_BTKH), put(self.v_BKSH, v_BTKH))

    def read(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, K, H]`."""
        return self.k_BKSH.swapaxes(1, 2).astype(dtype), self.v_BKSH.swapaxes(1, 2).astype(dtype)


class Cache(struct.PyTreeNode):
    """What a whole model remembers.

    Attributes:
      layers: one entry a layer.
      length_B: tokens seen so far, int32; of every beam.
      cross: of an encoder-decoder, one entry a layer: keys and values of the source, computed by the first call; None
        before it. They may have fewer rows than `layers`: each then serves several in a row.
      source_BS: real tokens of the source, bool.
      beams_BWS: int32, the beam in whose region the token at each position of each beam lies; None without beams.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    cross: tuple[LayerCache, ...] | None = None
    source_BS: jax.Array | None = None
    beams_BWS: jax.Array | None = None

    @property
    def content(self) -> tuple[LayerCache, ...]:
        """Keys and values, one entry a layer."""
        return self.layers

    def with_content(self, content: tuple[LayerCache, ...]) -> "Cache":
        """This cache with other keys and values."""
        return self.replace(layers=content)

    @property
    def num_beams(self) -> int:
        """Number of beams per row; 1 without a beam search."""
        return 1 if self.beams_BWS is None else self.beams_BWS.shape[1]

    @property
    def size(self) -> int:
        """S, number of slots per row or beam."""
        return self.content[0].k_BKSH.shape[2] // self.num_beams

    def widen(self, beams: int) -> "Cache":
        """The cache of `beams` beams a row, which continue from what the row holds without a copy of it."""
        (rows, _, size, _) = self.content[0].k_BKSH.shape
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, (beams - 1) * size), (0, 0)))
        table = jnp.zeros((rows, beams, size), jnp.int32)
        wide = self.with_content(jax.tree.map(pad, self.content))
        wide = wide.replace(length_B=jnp.repeat(self.length_B, beams), beams_BWS=table)
        return wide.follow(jnp.zeros((rows, beams), jnp.int32))

    def follow(self, parent_BW: jax.Array) -> "Cache":
        """The cache in which beam w continues beam `parent_BW[:, w]` and writes its next token into region w."""
        assert self.beams_BWS is not None
        table = jnp.take_along_axis(self.beams_BWS, parent_BW[:, :, None], axis=1)
        new = (self.length_B % self.size).reshape(*parent_BW.shape, 1) == jnp.arange(self.size)[None, None, :]
        return self.replace(beams_BWS=jnp.where(new, jnp.arange(self.num_beams)[None, :, None], table))

    def slots_of(self, positions_RT: jax.Array, real_RT: jax.Array) -> jax.Array:
        """Where tokens are written; behind the last slot where they are padding."""
        region = jnp.arange(positions_RT.shape[0])[:, None] % self.num_beams * self.size
        return jnp.where(real_RT, region + positions_RT % self.size, self.num_beams * self.size)

    def visible_BTS(self, steps: int) -> jax.Array | None:
        """`[B, W * steps, W * S]`: which slots hold a beam's past; None without beams."""
        if self.beams_BWS is None:
            return None
        b, w, s = self.beams_BWS.shape
        visible = self.beams_BWS[:, :, None, :] == jnp.arange(w)[None, None, :, None]
        return jnp.repeat(visible.reshape(b, w, w * s), steps, axis=1)

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
