"""Cross-entropy over large vocabularies, without a second float32 copy of the logits.

The gradient is written by hand: from the saved logits it is `p * g - onehot * g`, one fused pass, where autodiff
keeps the probabilities beside the logits. `chunk` goes further and holds the logits of `chunk` tokens only,
computing them again in the backward pass.

Sources: Szegedy et al. 2016 (label smoothing), https://arxiv.org/abs/1512.00567; Chowdhery et al. 2022 (z-loss),
https://arxiv.org/abs/2204.02311, section 5.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.nn.output import Head


def _columns(logits_TV: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, logits_TV.ndim - 1)


def _is_label(logits_TV: jax.Array, labels_T: jax.Array) -> jax.Array:
    # comparing fuses with the pass over the logits, and stays sharded where a gather would not
    return _columns(logits_TV) == jnp.broadcast_to(labels_T[..., None], logits_TV.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def token_losses(
    logits_TV: jax.Array, labels_T: jax.Array, vocab_size: int, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Loss and log-partition of every position.

    Args:
      logits_TV: float32 logits; columns behind `vocab_size` are padding and hold very low values.
      labels_T: targets.
      vocab_size: V.
      label_smoothing: mass spread evenly over all V entries (torch's definition).

    Returns:
      (cross-entropy against the smoothed target, log of the softmax's denominator), both `[T]`.
    """
    return _token_losses_fwd(logits_TV, labels_T, vocab_size, label_smoothing)[0]


def _token_losses_fwd(logits_TV, labels_T, vocab_size, label_smoothing):
    top = jnp.max(logits_TV, axis=-1, keepdims=True)
    lse = jnp.log(jnp.sum(jnp.exp(logits_TV - top), axis=-1)) + top[..., 0]
    own = jnp.sum(jnp.where(_is_label(logits_TV, labels_T), logits_TV, 0), axis=-1)
    if label_smoothing:
        real = _columns(logits_TV) < vocab_size
        mean = jnp.sum(jnp.where(real, logits_TV, 0), axis=-1) / vocab_size
        own = (1 - label_smoothing) * own + label_smoothing * mean
    return (lse - own, lse), (logits_TV, labels_T, lse)


def _token_losses_bwd(vocab_size, label_smoothing, saved, cotangents):
    logits_TV, labels_T, lse = saved
    g_loss, g_lse = (g[..., None] for g in cotangents)
    p = jnp.exp(logits_TV - lse[..., None])
    target = jnp.where(_is_label(logits_TV, labels_T), 1 - label_smoothing, 0.0)
    if label_smoothing:
        target = target + jnp.where(_columns(logits_TV) < vocab_size, label_smoothing / vocab_size, 0.0)
    return (p * (g_loss + g_lse) - target * g_loss).astype(logits_TV.dtype), None


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def cross_entropy_sums(
    h_BTD: jax.Array,
    head: Head,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over all positions.

    Args:
      h_BTD: last hidden states.
      head: output layer.
      labels_BT: targets.
      weights_BT: weight of each position, 0 = not counted.
      label_smoothing: see `token_losses`.
      chunk: positions whose logits exist at once; 0 means all.

    Returns:
      (cross-entropy, squared log-partition, correct top predictions), each a weighted float32 sum.
    """
    size = head.vocab_size

    def sums(h: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = head.logits(h)
        loss, lse = token_losses(logits, labels, size, label_smoothing)
        best = jax.lax.stop_gradient(jnp.argmax(logits, axis=-1))
        weights = weights.astype(loss.dtype)
        return (
            jnp.sum(loss * weights),
            jnp.sum(jnp.square(lse) * weights),
            jnp.sum((best == labels) * weights),
        )

    if not chunk:
        return sums(h_BTD, labels_BT, weights_BT)
    d = h_BTD.shape[-1]
    flat = lambda x, *tail: x.reshape(-1, *tail)
    h, labels, weights = flat(h_BTD, d), flat(labels_BT), flat(weights_BT)
    fill = -labels.shape[0] % chunk
    h, labels, weights = jnp.pad(h, ((0, fill), (0, 0))), jnp.pad(labels, (0, fill)), jnp.pad(weights, (0, fill))

    def body(carry: Any, x: Any) -> Any:
        return jax.tree.map(jnp.add, carry, jax.checkpoint(sums)(*x)), None

    zero = jnp.zeros((), jnp.promote_types(jnp.float32, h.dtype))
    chunks = (h.reshape(-1, chunk, d), labels.reshape(-1, chunk), weights.reshape(-1, chunk))
    return jax.lax.scan(body, (zero, zero, zero), chunks)[0]
