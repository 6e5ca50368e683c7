"""What all models do before and after their layers: positions, masks, cache slots, outputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models.shared.output import Output
from llm_jax.nn.attend import Mask
from llm_jax.nn.cache import Cache, joined
from llm_jax.nn.output import Head


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything the layers need beside the hidden states.

    Attributes:
      positions_BT: positions that encodings read.
      mask: who may look where.
      slots_BT: cache slots of the new tokens, None without a cache.
      length_B: the cache's new length, None without a cache.
      cache: what was decoded before, None without.
    """

    positions_BT: jax.Array
    mask: Mask
    slots_BT: jax.Array | None
    length_B: jax.Array | None
    cache: Cache | None = None

    def remember(self, layers: Any) -> Any:
        """The cache with what the layers hold now, None without one."""
        return None if self.cache is None else self.cache.replace(layers=layers, length_B=self.length_B)


def is_concrete(x: Any) -> bool:
    """Whether values can be looked at: neither a tracer nor partly on other processes."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_call(
    module: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    token_type_ids: jax.Array | None,
    train: bool,
    num_token_types: int = 0,
) -> None:
    """Refuses arguments that a model cannot honour.

    Raises:
      ValueError: on token types where the model has none or not as many (seen outside of `jit` only), ids that are no
        [B, T] integers, a mask of another shape, or a dropout key that disagrees with `train`.
    """
    if token_type_ids is not None and num_token_types == 0:
        raise ValueError(f"{type(module).__name__} has no token types; leave token_type_ids=None")
    if token_type_ids is not None and is_concrete(token_type_ids) and token_type_ids.size:
        low, high = int(np.asarray(token_type_ids).min()), int(np.asarray(token_type_ids).max())
        if low < 0 or high >= num_token_types:
            raise ValueError(f"token_type_ids hold {low if low < 0 else high}; the model has {num_token_types} types")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [B, T] like input_ids {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be [B, T] integers, got {input_ids.dtype}{list(input_ids.shape)}")
    if train and not module.has_rng("dropout"):
        raise ValueError('train=True needs a dropout key: pass rngs={"dropout": key}')
    if not train and module.has_rng("dropout"):
        raise ValueError("a dropout key was given but train=False; drop the key or set train=True")


def _segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions that restart at 0 where a new segment begins."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _check_room(cache: Cache, attention_mask: jax.Array | None, t: int) -> None:
    """Refuses several tokens at once that would go around the cache; where values are traced nothing is checked."""
    if not is_concrete(cache.length_B) or not is_concrete(attention_mask):
        return
    lengths = np.asarray(cache.length_B)
    real = np.full(lengths.shape, t) if attention_mask is None else np.asarray(attention_mask).astype(bool).sum(1)
    for row in np.flatnonzero((real > 1) & (lengths + real > cache.size)):
        raise ValueError(
            f"{real[row]} tokens at once would overwrite what the first of them still see in a cache of {cache.size} "
            f"that holds {lengths[row]}: pass one at a time, or take a larger cache"
        )


def read_inputs(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    context_length: int | None,
    window: int | None = None,
    causal: bool = True,
) -> Inputs:
    """Positions, mask and cache slots.

    Without `position_ids`, positions count real tokens from 0 (left and right padding both work), and restart in
    every segment of a packed row.

    Args:
      input_ids: `[B, T]`.
      attention_mask: `[B, T]`, 1 = real token; None means all.
      position_ids: `[B, T]`, overrides the positions (not the order of attention).
      segment_ids: `[B, T]`, documents of a packed row; attention stays inside.
      cache: what was decoded before.
      context_length: longest sequence of the model, None without a limit.
      window: sliding-window width.
      causal: a token sees none behind it; False for encoders, which have no cache.

    Raises:
      ValueError: if the sequence exceeds `context_length` or the cache, segments meet a cache, or several tokens
        would go around a full cache (seen outside of `jit` only).
    """
    b, t = input_ids.shape
    if context_length is not None and t > context_length:
        raise ValueError(f"sequence of {t} tokens is longer than the model's context of {context_length}")
    real = jnp.ones((b, t), bool) if attention_mask is None else attention_mask.astype(bool)
    if cache is not None:
        if segment_ids is not None:
            raise ValueError("segment_ids and a cache exclude each other: decode one document a row")
        if t > cache.size:
            raise ValueError(f"{t} tokens do not fit into a cache of {cache.size}")
        if t > 1 and (window is None or window + t - 1 > cache.size):
            _check_room(cache, attention_mask, t)
        order = cache.positions_of(real)
        length_B = cache.length_B + jnp.sum(real, axis=1, dtype=jnp.int32)
        rows = b // cache.num_beams
        at = joined(order, rows), joined(cache.key_positions(length_B), rows)
        mask = Mask(*at, window=window, allowed_BTS=cache.visible_BTS(t))
        position_ids = jnp.maximum(order, 0) if position_ids is None else position_ids
        return Inputs(position_ids, mask, cache.slots_of(order, real), length_B, cache)
    index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    ordered = attention_mask is None and segment_ids is None
    mask = Mask(index, jnp.where(real, index, -1), segment_ids, segment_ids, causal, window, ordered)
    if position_ids is None and segment_ids is not None:
        position_ids = _segment_positions(segment_ids)
    elif position_ids is None and attention_mask is not None:
        position_ids = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    return Inputs(index if position_ids is None else position_ids, mask, None, None)


def finish(h_BTD: jax.Array, first_BTD: jax.Array, outputs: Any, head: Head | None, inputs: Inputs) -> Output:
    """Builds the `Output` from the last normalised state and what the blocks returned."""
    caches, hidden, attentions, _ = zip(*outputs, strict=True)
    return Output(
        logits=None if head is None else head.logits(h_BTD),
        last_hidden_state=h_BTD,
        head=head,
        hidden_states=None if hidden[0] is None else (first_BTD, *hidden[:-1], h_BTD),
        attentions=None if attentions[0] is None else attentions,
        cache=inputs.remember(tuple(layer for layer, _ in caches)),
    )
