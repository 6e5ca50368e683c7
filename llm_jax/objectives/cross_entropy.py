"""Cross-entropy over large vocabularies, without a second float32 copy of the logits.

The gradient is written by hand: from the saved logits it is `p * g - onehot * g`, one fused pass, where autodiff
keeps the probabilities beside the logits. `chunks` goes further and holds the logits of a part of the length only;
the gradient of a part is taken at once, up to the factor that the loss is multiplied with, so that nothing is
computed twice.

Sources: Szegedy et al. 2016 (label smoothing), https://arxiv.org/abs/1512.00567; Chowdhery et al. 2022 (z-loss),
https://arxiv.org/abs/2204.02311, section 5; Hsu et al. 2024 (gradients beside the chunk's logits),
https://arxiv.org/abs/2410.10989.
"""

import functools

import jax
import jax.numpy as jnp

from llm_jax.nn.output import Head
from llm_jax.nn.weights import wide


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
      logits_TV: logits, computed with in float32; columns behind `vocab_size` are padding and hold very low values.
      labels_T: targets.
      vocab_size: V.
      label_smoothing: mass spread evenly over all V entries (torch's definition).

    Returns:
      (cross-entropy against the smoothed target, log of the softmax's denominator), both `[T]`.
    """
    return _token_losses_fwd(logits_TV, labels_T, vocab_size, label_smoothing)[0]


def _token_losses_fwd(narrow_TV, labels_T, vocab_size, label_smoothing):
    logits_TV = wide(narrow_TV)
    top = jnp.max(logits_TV, axis=-1, keepdims=True)
    lse = jnp.log(jnp.sum(jnp.exp(logits_TV - top), axis=-1)) + top[..., 0]
    label_logit = jnp.sum(jnp.where(_is_label(logits_TV, labels_T), logits_TV, 0), axis=-1)
    if label_smoothing:
        real = _columns(logits_TV) < vocab_size
        mean = jnp.sum(jnp.where(real, logits_TV, 0), axis=-1) / vocab_size
        label_logit = (1 - label_smoothing) * label_logit + label_smoothing * mean
    return (lse - label_logit, lse), (narrow_TV, labels_T, lse)


def _token_losses_bwd(vocab_size, label_smoothing, saved, cotangents):
    narrow_TV, labels_T, lse = saved
    logits_TV = wide(narrow_TV)
    g_loss, g_lse = (g[..., None] for g in cotangents)
    p = jnp.exp(logits_TV - lse[..., None])
    target = jnp.where(_is_label(logits_TV, labels_T), 1 - label_smoothing, 0.0)
    if label_smoothing:
        target = target + jnp.where(_columns(logits_TV) < vocab_size, label_smoothing / vocab_size, 0.0)
    d_logits = (p * (g_loss + g_lse) - target * g_loss).astype(narrow_TV.dtype)
    return jax.lax.optimization_barrier(d_logits), None  # else XLA:CPU computes it for each product that reads it


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def _sums(h_BTD, head, labels_BT, weights_BT, label_smoothing):
    logits = head.logits(h_BTD, wide=False)
    loss, lse = token_losses(logits, labels_BT, head.vocab_size, label_smoothing)
    best = jax.lax.stop_gradient(jnp.argmax(logits, axis=-1))
    weights_BT = weights_BT.astype(loss.dtype)
    return (
        jnp.sum(loss * weights_BT),
        jnp.sum(jnp.square(lse) * weights_BT),
        jnp.sum((best == labels_BT) * weights_BT),
    )


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """`[B, T, ...]` to `[chunks, B, T / chunks, ...]`, zeros behind; every chunk holds all rows, as devices do."""
    fill = -x.shape[1] % chunks
    x = jnp.pad(x, [(0, 0), (0, fill), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)


def _chunked(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks):
    """Sums over chunks; differentiated, it computes the logits again."""
    part = jax.checkpoint(lambda h, labels, weights: _sums(h, head, labels, weights, label_smoothing))
    body = lambda total, x: (jax.tree.map(jnp.add, total, part(*x)), None)
    zero = jnp.zeros((), jnp.promote_types(jnp.float32, h_BTD.dtype))
    pieces = tuple(_split(x, chunks) for x in (h_BTD, labels_BT, weights_BT))
    return jax.lax.scan(body, (zero, zero, zero), pieces)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks):
    """`_chunked` for a loss without z-loss: the gradient is known but for a factor while the logits are there."""
    return _chunked(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks)


def _fused_fwd(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks):
    is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    leaves, tree = jax.tree.flatten(head, is_leaf=is_primal)
    learned = [i for i, leaf in enumerate(leaves) if leaf.perturbed]  # a frozen head costs no product
    leaves = [leaf.value for leaf in leaves]
    h_BTD, labels_BT, weights_BT = h_BTD.value, labels_BT.value, weights_BT.value

    def part(h, learned_leaves, labels, weights):
        trained = dict(zip(learned, learned_leaves, strict=True))
        whole = jax.tree.unflatten(tree, [trained.get(i, leaf) for i, leaf in enumerate(leaves)])
        loss, *rest = _sums(h, whole, labels, weights, label_smoothing)
        return loss, rest

    def body(carry, x):
        total, d_leaves = carry
        h, labels, weights = x
        loss, back, rest = jax.vjp(
            lambda h, ls: part(h, ls, labels, weights), h, [leaves[i] for i in learned], has_aux=True
        )
        d_h, more = back(jnp.ones_like(loss))
        total = jax.tree.map(jnp.add, total, (loss, *rest))
        return (total, jax.tree.map(lambda a, b: a + wide(b), d_leaves, more)), d_h

    zero = wide(jnp.zeros((), h_BTD.dtype))
    zeros = [jnp.zeros_like(wide(leaves[i])) for i in learned]
    pieces = tuple(_split(x, chunks) for x in (h_BTD, labels_BT, weights_BT))
    (total, d_leaves), d_h = jax.lax.scan(body, ((zero, zero, zero), zeros), pieces)
    d_h = jnp.moveaxis(d_h, 0, 1).reshape(h_BTD.shape[0], -1, h_BTD.shape[2])[:, : h_BTD.shape[1]]
    d_head: list[jax.Array | None] = [None] * len(leaves)
    for i, d in zip(learned, d_leaves, strict=True):
        d_head[i] = d.astype(leaves[i].dtype)
    return total, (d_h, jax.tree.unflatten(tree, d_head))


def _fused_bwd(label_smoothing, chunks, saved, cotangents):
    del label_smoothing, chunks
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    d_h, d_head = jax.tree.map(lambda d: d * g.astype(d.dtype), saved)
    return d_h, d_head, None, None


_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


def cross_entropy_sums(
    h_BTD: jax.Array,
    head: Head,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    label_smoothing: float = 0.0,
    chunks: int = 1,
    z_loss: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over all positions.

    Args:
      h_BTD: last hidden states.
      head: output layer.
      labels_BT: targets.
      weights_BT: weight of each position, 0 = not counted; no gradient flows to it when in chunks.
      label_smoothing: see `token_losses`.
      chunks: parts that the length is cut into; only one part's logits exist at once.
      z_loss: whether the second sum is differentiated. Without it the chunks' gradients are computed beside their
        logits; with it, and in float16, the logits are computed twice.

    Returns:
      (cross-entropy, squared log-partition, correct top predictions), each a weighted float32 sum.
    """
    chunks = min(chunks, h_BTD.shape[1])
    if chunks <= 1:
        return _sums(h_BTD, head, labels_BT, weights_BT, label_smoothing)
    if z_loss or h_BTD.dtype == jnp.float16:  # whose range does not hold the sum before the loss scale and the mean
        return _chunked(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks)
    loss, squares, correct = _fused(h_BTD, head, labels_BT, weights_BT, label_smoothing, chunks)
    return loss, jax.lax.stop_gradient(squares), correct
