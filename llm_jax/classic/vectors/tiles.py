"""Tiles of text: L centre words in a row, with W words of context on either side, M = L + 2 W in all."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Tiles, or one of them (without B).

    Attributes:
      words: int32 `[B, M]`.
      near: which of them are in the window of which centre, 0 or 1, float32 `[B, L, M]`.
    """

    words: jax.Array
    near: jax.Array

    @property
    def centres(self) -> jax.Array:
        """The centre words, `[B, L]`."""
        length, width = self.near.shape[-2:]
        reach = (width - length) // 2
        return self.words[..., reach : reach + length]


@functools.partial(jnp.vectorize, signature="(m),(l)->(l,m)")
def band(sentences: jax.Array, windows: jax.Array) -> jax.Array:
    """Which words are in the window of which centre: float32 `[..., L, M]`.

    Args:
      sentences: the sentence of each word, int32 `[..., M]`; -1 where there is no word.
      windows: reach of each centre's window, int32 `[..., L]`.
    """
    length, width = len(windows), len(sentences)
    reach = (width - length) // 2
    distance = jnp.abs(jnp.arange(length)[:, None] + reach - jnp.arange(width)[None, :])
    near = (distance > 0) & (distance <= windows[:, None])
    centre = sentences[reach : reach + length, None]
    return (near & (centre == sentences[None, :]) & (centre >= 0)).astype(jnp.float32)


def draw_windows(key: jax.Array, shape: tuple[int, ...], reach: int, dynamic: bool) -> jax.Array:
    """Windows of centres, int32: from 1 to `reach` alike where they are dynamic, so that near words count more."""
    if not dynamic:
        return jnp.full(shape, reach, jnp.int32)
    return jax.random.randint(key, shape, 1, reach + 1, jnp.int32)
