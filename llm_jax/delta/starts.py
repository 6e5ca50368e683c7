"""First values of A and B that are taken out of the base, so that the sum is the same matrix.

*   PiSSA: the r largest singular values and vectors; the base keeps the rest. The part that is taken out is the best
    approximation of rank r (Eckart and Young), so the base is left with the smallest norm that it can have.
*   OLoRA: the first r columns of Q and rows of R; A and B are orthogonal and triangular.
*   LoftQ: the base is quantized, and A B is the best approximation of what rounding lost. Both are computed in turn.

Sources: Meng et al. 2024 (PiSSA), https://arxiv.org/abs/2404.02948; Büyükakyüz 2024 (OLoRA),
https://arxiv.org/abs/2406.01775; Li et al. 2023 (LoftQ), https://arxiv.org/abs/2310.08659. Orientation and scales as in
peft's `tuners/lora/layer.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.compress.quantize import Quantized, quantize_array
from llm_jax.nn import weights

ROUNDS = 10  # on the kernels of SmolLM2 what is left is then longer than the least by 1e-5 of itself, or less

Start = Callable[[Any, int, float], tuple[Any, jax.Array, jax.Array]]  # (w, r, scale) -> (base, A, B)


def leading(w: jax.Array, rank: int, rounds: int = ROUNDS) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(U, S, V) of at least the r largest singular values of `[..., in, out]`, the largest first.

    A basis of `2 r + 16` columns is multiplied by W.T W again and again. So the work is products, which are fast and
    can be divided over devices; a whole decomposition of every kernel takes several times as long. Where the basis
    would be half of the matrix, the decomposition is whole.
    """
    width = 2 * rank + 16
    if 2 * width >= min(w.shape[-2:]):
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        return u, s, v
    turned = jnp.swapaxes(w, -1, -2)
    basis = lambda y: jnp.linalg.qr(y)[0]
    q = jax.random.normal(jax.random.key(0), (w.shape[-1], width), w.dtype)
    q = jnp.broadcast_to(q, (*w.shape[:-2], *q.shape))
    q = jax.lax.fori_loop(0, rounds, lambda _, q: basis(turned @ (w @ q)), q)
    left = basis(w @ q)
    u, s, v = jnp.linalg.svd(jnp.swapaxes(left, -1, -2) @ w, full_matrices=False)
    return left @ u, s, v


def _largest(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """A `[..., in, r]` and B `[..., r, out]` with `scale * A B` the best approximation of `w` of this rank."""
    u, s, v = leading(w, rank)
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


@functools.partial(jax.jit, static_argnums=(1, 2))
def pissa(w: Any, rank: int, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(what is left of W, A, B) by its largest singular values; W is `[in, out]`, with leading axes or without."""
    dense = weights.wide(weights.dense(w))
    a, b = _largest(dense, rank, scale)
    return (dense - scale * (a @ b)).astype(weights.dense(w).dtype), a, b


@functools.partial(jax.jit, static_argnums=(1, 2))
def olora(w: Any, rank: int, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(what is left of W, A, B) by a QR decomposition of the transpose, as peft stores kernels.

    The first r columns of Q depend on the first r columns of the transpose only, and R is Q.T times the transpose.
    """
    dense = weights.wide(weights.dense(w))
    q = jnp.linalg.qr(jnp.swapaxes(dense[..., :rank, :], -1, -2))[0]
    a, b = dense @ q, jnp.swapaxes(q, -1, -2)
    return (dense - scale * (a @ b)).astype(weights.dense(w).dtype), a, b


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def loftq(w: Any, rank: int, scale: float, rounds: int = 4) -> tuple[Quantized, jax.Array, jax.Array]:
    """(int8 base, A, B) whose sum is nearest to W; of `rounds` alternations the best is taken, layer by layer."""
    dense = weights.wide(weights.dense(w))
    low = jnp.zeros_like(dense)
    best: tuple[jax.Array, Quantized, jax.Array, jax.Array] | None = None
    for _ in range(rounds):
        base = quantize_array(dense - low)
        a, b = _largest(dense - base.dense(), rank, scale)
        low = scale * (a @ b)
        error = jnp.linalg.norm(dense - base.dense() - low, axis=(-2, -1))
        now = (error, base, a, b)
        if best is None:
            best = now
            continue
        better = error < best[0]
        pick = lambda x, y, better=better: jnp.where(better.reshape(*better.shape, *[1] * (x.ndim - better.ndim)), x, y)
        best = jax.tree.map(pick, now, best)
    assert best is not None
    return best[1:]


STARTS: dict[str, Start] = {"pissa": pissa, "olora": olora, "loftq": loftq}
