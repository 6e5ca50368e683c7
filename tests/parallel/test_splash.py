"""The TPU's kernel, interpreted step by step, against the reference: outputs and gradients, grouped heads, windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import attend
from llm_jax.nn.attend import Mask
from llm_jax.nn.execution import Execution
from llm_jax.parallel import splash
from llm_jax.parallel.mesh import make_mesh

B, T, H = 2, 256, 128
RNG = np.random.default_rng(0)


def arrays(n, k, rows=B):
    make = lambda count: jnp.asarray(RNG.normal(size=(rows, T, count, H)), jnp.float32)
    return make(n), make(k), make(k)


def mask_of(causal, window, rows=B):
    index = jnp.broadcast_to(jnp.arange(T), (rows, T))
    return Mask(index, index, causal=causal, window=window, ordered=True)


@pytest.mark.parametrize("n, k, causal, window", [(2, 2, True, None), (4, 2, True, 100), (2, 1, False, None)])
def test_equals_the_reference(n, k, causal, window):
    q, key, value = arrays(n, k)
    weight = jnp.asarray(RNG.normal(size=q.shape), jnp.float32)
    mask = mask_of(causal, window)

    def kernel(q, key, value):
        return splash.attend_here(q, key, value, causal, window, H**-0.5, interpret=True)

    def reference(q, key, value):
        return attend.attend(q, key, value, mask, scale=H**-0.5, implementation="reference")

    def both(f):
        loss = lambda *a: (jnp.sum(f(*a) * weight), f(*a))
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, key, value)
        return out, *grads

    (out, *grads), (want, *want_grads) = both(kernel), both(reference)
    np.testing.assert_allclose(out, want, atol=2e-5)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("remat, kept", [("dots", True), ("names:kernel", True), ("full", False)])
def test_whether_what_the_kernel_returns_is_kept(remat, kept):
    """Its output and the logarithms of its sums, or the backward pass runs it again."""
    q, key, value = arrays(2, 2)
    run = lambda *a: splash.attend_here(*a, True, None, H**-0.5, interpret=True)
    run = jax.checkpoint(run, policy=Execution(remat=remat).remat_policy())
    residuals = jax.eval_shape(lambda *a: jax.tree.leaves(jax.vjp(run, *a)[1]), q, key, value)
    assert ({(B, 2, T, H), (B, 2, T)} <= {x.shape for x in residuals}) == kept


def test_divided_over_rows_and_heads():
    """Each of 8 devices runs the kernel on its own rows and heads; `attend` takes it where it fits."""
    kernel = splash.Splash(make_mesh({"data": 4, "model": 2}), ("replica", "data"), "model", interpret=True)
    q, key, value = arrays(2, 2, rows=4)
    mask = mask_of(True, None, rows=4)
    call = lambda *a, **kw: attend.attend(*a, mask, scale=H**-0.5, **kw)
    jaxpr = str(jax.make_jaxpr(lambda *a: call(*a, kernel=kernel))(q, key, value))
    assert "shard_map" in jaxpr and "pallas_call" in jaxpr
    np.testing.assert_allclose(
        jax.jit(lambda *a: call(*a, kernel=kernel))(q, key, value),
        call(q, key, value, implementation="reference"),
        atol=2e-5,
    )


def test_what_does_not_fit_goes_another_way():
    kernel = splash.Splash(make_mesh({"data": 4, "model": 2}), ("data",), "model")
    fits = lambda b, t, n, h, k=None, dtype=jnp.bfloat16: kernel.fits(
        *(jax.ShapeDtypeStruct((b, t, heads, h), dtype) for heads in (n, k or n)), None, False, False
    )
    assert fits(4, 256, 2, 128) and fits(8, 384, 4, 256, 2)
    assert not fits(3, 256, 2, 128)  # rows
    assert not fits(4, 200, 2, 128)  # lanes
    assert not fits(4, 256, 2, 64)
    assert not fits(4, 256, 4, 128, 1)  # heads
    assert not fits(4, 256, 2, 128, dtype=jnp.float16)
