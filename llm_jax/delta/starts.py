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

Start = Callable[[Any, int, float], tuple[Any, jax.Array, jax.Array]]  # (w, r, scale) -> (base, A, B)


def _largest(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """A `[..., in, r]` and B `[..., r, out]` with `scale * A B` the best approximation of `w` of this rank."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
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
    """(what is left of W, A, B) by a QR decomposition of the transpose, as peft stores kernels."""
    dense = weights.wide(weights.dense(w))
    q, r = jnp.linalg.qr(jnp.swapaxes(dense, -1, -2))
    a, b = jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :, :rank], -1, -2)
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
