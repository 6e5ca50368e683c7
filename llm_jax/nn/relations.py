"""Who is where and may see whom in any order of a text: what XLNet's attention reads, the same for all layers.

Source: Yang et al. 2019, sections 2.3 to 2.6, https://arxiv.org/abs/1906.08237.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llm_jax.nn.attend import Mask
from llm_jax.nn.positions import sinusoid_halves


class Relations(struct.PyTreeNode):
    """Masks of both streams, and the distances and segments between their positions.

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

    without_rows: ClassVar[tuple[str, ...]] = ("encodings_GPD",)  # all other arrays lead with rows, or with one

    encodings_GPD: jax.Array
    content: Mask
    query: Mask | None = None
    targets_BK: jax.Array | None = None
    differ_BTS: jax.Array | None = None
    slots_BT: jax.Array | None = None
    backwards_B: jax.Array | None = None


def distance_encodings(queries: int, keys: int, features: int, clamp: int | None, backwards: bool) -> np.ndarray:
    """`[G, keys + queries, features]` float64: sines, then cosines."""
    distance = np.arange(keys, -queries, -1, dtype=np.float64)
    distance = distance if clamp is None else np.clip(distance, -clamp, clamp)
    both = [distance, -distance] if backwards else [distance]
    return np.stack([sinusoid_halves(d, features) for d in both])


def to_cache(
    mask: Mask, slots_BT: jax.Array | None, targets_BK: jax.Array | None, size: int, features: int, clamp: int | None
) -> Relations:
    """Relations of new tokens to a text that a cache of `size` slots holds; both streams look at the same keys."""
    distance = np.arange(size + 1)
    distance = distance if clamp is None else np.minimum(distance, clamp)
    encodings = jnp.asarray(sinusoid_halves(distance, features))[None]
    return Relations(encodings, mask, mask, targets_BK, slots_BT=slots_BT)


class Order(NamedTuple):
    """In which order the tokens of rows are seen and predicted; the default sees all and predicts none.

    Attributes:
      perm_mask: `[B, T, T]`, 1 = position i may not see position j.
      targets_BK: positions that the query stream predicts.
      types_BT: int32, segments: attention knows whether two tokens agree.
      backwards_B: rows whose text is reversed.
      left_to_right: position i sees those up to itself, and the query stream predicts position i + 1 from them.
    """

    perm_mask: jax.Array | None = None
    targets_BK: jax.Array | None = None
    types_BT: jax.Array | None = None
    backwards_B: jax.Array | None = None
    left_to_right: bool = False


def within_text(
    shape: tuple[int, int],
    order: Order,
    features: int,
    attention_mask: jax.Array | None = None,
    clamp: int | None = None,
    causal: bool = False,
    same_length: bool = False,
    memory_length: int = 0,
    filled_B: jax.Array | None = None,
) -> Relations:
    """Relations among the tokens of a row, and to a memory of the text before.

    Args:
      shape: (B, T).
      order: which tokens are seen and predicted when.
      features: D, width of the encodings.
      attention_mask: `[B, T]`, 1 = real token.
      clamp: longer distances count as this one; None for none.
      causal: a position sees none behind it, whatever the order.
      same_length: with `causal`, every position sees as many keys.
      memory_length: M, states that the memory holds.
      filled_B: how many of the last of them are filled; None without a memory.
    """
    (b, t), m = shape, memory_length
    s = m + t
    distance = jnp.arange(t)[:, None] + m - jnp.arange(s)[None, :]
    seen = jnp.ones((b, t, s), bool)
    if causal or order.left_to_right:
        seen &= (distance >= 0)[None]
        if same_length:
            seen &= (distance <= m)[None]
    if filled_B is not None:
        filled = jnp.arange(m)[None, :] >= m - filled_B[:, None]
        seen = seen.at[:, :, :m].set(seen[:, :, :m] & filled[:, None])
    now = jnp.ones((b, t, t), bool)
    if attention_mask is not None:
        now &= attention_mask.astype(bool)[:, None, :]
    if order.perm_mask is not None:
        now &= order.perm_mask == 0
    asks = seen.at[:, :, m:].set(seen[:, :, m:] & now)
    itself = (distance == 0)[None]

    def mask(allowed_BTS: jax.Array) -> Mask:
        zeros_BT = jnp.zeros(allowed_BTS.shape[:2], jnp.int32)
        return Mask(zeros_BT, jnp.zeros((b, s), jnp.int32), causal=False, allowed_BTS=allowed_BTS)

    query, targets_BK, types_BT = None, order.targets_BK, order.types_BT
    if order.left_to_right:
        query = mask(asks)
    elif targets_BK is not None:
        query = mask(jnp.take_along_axis(asks, targets_BK[:, :, None], axis=1))
    differ_BTS = None
    if types_BT is not None:
        types_BS = jnp.concatenate([jnp.zeros((b, m), jnp.int32), types_BT], axis=1)
        differ_BTS = types_BT[:, :, None] != types_BS[:, None, :]
    return Relations(
        encodings_GPD=jnp.asarray(distance_encodings(t, s, features, clamp, order.backwards_B is not None)),
        content=mask(asks | itself),
        query=query,
        targets_BK=targets_BK,
        differ_BTS=differ_BTS,
        backwards_B=order.backwards_B,
    )
