"""PiSSA, OLoRA and LoftQ: the sum is the same matrix, and the part that is taken out is what the papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress.quantize import quantize_array
from llm_jax.delta import starts

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 10, 7))  # a stack of three


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("w", [W, W[0]], ids=["stacked", "one"])
def test_the_sum_is_unchanged(name, w):
    with jax.enable_x64(True):
        base, a, b = starts.STARTS[name](jnp.asarray(w), 3, 0.7)
        np.testing.assert_allclose(base + 0.7 * a @ b, w, rtol=1e-12, atol=1e-12)
        assert a.shape == (*w.shape[:-1], 3) and b.shape == (*w.shape[:-2], 3, 7)


def test_pissa_leaves_the_smallest_norm():
    """Eckart and Young: what is left has the singular values behind the first r; A and B share them equally."""
    with jax.enable_x64(True):
        base, a, b = starts.pissa(jnp.asarray(W), 3, 0.7)
        for i in range(3):
            s = np.linalg.svd(W[i], compute_uv=False)
            np.testing.assert_allclose(np.linalg.norm(base[i]), np.linalg.norm(s[3:]), rtol=1e-10)
            np.testing.assert_allclose(np.linalg.svd(0.7 * a[i] @ b[i], compute_uv=False)[:3], s[:3], rtol=1e-10)
            np.testing.assert_allclose(a[i].T @ a[i], b[i] @ b[i].T, rtol=1e-10, atol=1e-12)


def test_the_largest_part_of_a_large_matrix():
    """Found by products alone: nearly as close as any matrix of this rank, with almost equal singular values."""
    u, v = (np.linalg.qr(RNG.normal(size=(2, n, 60)))[0] for n in (90, 60))
    w = (u * 0.9 ** np.arange(60)) @ v.swapaxes(-1, -2)  # singular values as slowly smaller as those of trained kernels
    u, s, v = map(np.asarray, starts.leading(jnp.asarray(w, jnp.float32), 4))
    for i in range(2):
        exact = np.linalg.svd(w[i], compute_uv=False)
        np.testing.assert_allclose(s[i][:4], exact[:4], rtol=1e-5)
        left = np.linalg.norm(w[i] - (u[i][:, :4] * s[i][:4]) @ v[i][:4])
        assert left == pytest.approx(np.linalg.norm(exact[4:]), rel=1e-5)


def test_olora_is_orthogonal_and_triangular():
    with jax.enable_x64(True):
        _, a, b = starts.olora(jnp.asarray(W), 3, 0.7)
        for i in range(3):
            np.testing.assert_allclose(b[i] @ b[i].T, np.eye(3), atol=1e-12)
            np.testing.assert_allclose(np.tril(a[i].T, -1), 0, atol=1e-12)


def test_loftq_is_never_worse_than_rounding_and_improves_with_rounds():
    w = jnp.asarray(W, jnp.float32)
    error = lambda base, a, b: np.linalg.norm(np.asarray(w - base.dense() - 0.7 * a @ b), axis=(-2, -1))
    plain = np.linalg.norm(np.asarray(w - quantize_array(w).dense()), axis=(-2, -1))
    errors = [error(*starts.loftq(w, 3, 0.7, rounds)) for rounds in (1, 2, 5)]
    assert (errors[0] < plain).all()
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert (later <= earlier * (1 + 1e-6)).all()
