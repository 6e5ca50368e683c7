"""Top-k of long columns, such as logits over a vocabulary."""

import jax
import jax.numpy as jnp

BLOCK = 128  # entries that `top_k` first represents by their maximum


def whole_blocks(x_VR: jax.Array) -> jax.Array:
    """Appends rows of -inf up to a multiple of `BLOCK`, so that `top_k` copies nothing."""
    missing = -x_VR.shape[0] % BLOCK
    return jnp.pad(x_VR, ((0, missing), (0, 0)), constant_values=-jnp.inf) if missing else x_VR


def top_k(x_VR: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each column and their indices, `[R, k]`: `jax.lax.top_k(x_VR.T, k)`.

    The k largest lie in the k blocks with the largest maxima; only those are sorted.
    """
    size, rows = x_VR.shape
    if size < 4 * k * BLOCK:
        return jax.lax.top_k(x_VR.T, k)
    even = size // BLOCK * BLOCK
    largest = jnp.max(x_VR[:even].reshape(-1, BLOCK, rows), axis=1)
    if even < size:
        largest = jnp.concatenate([largest, jnp.max(x_VR[even:], axis=0, keepdims=True)])
    blocks = jnp.sort(jax.lax.top_k(largest.T, k)[1], axis=-1)  # in order, so that ties keep theirs
    index = (blocks[:, :, None] * BLOCK + jnp.arange(BLOCK)[None, None, :]).reshape(rows, -1)
    found = x_VR[jnp.minimum(index, size - 1), jnp.arange(rows)[:, None]]
    values, position = jax.lax.top_k(jnp.where(index < size, found, -jnp.inf), k)
    return values, jnp.take_along_axis(index, position, axis=1)
