"""Norms against numpy, with float32 statistics, and why batch norm is not for language models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from llm_jax.nn.norms import LayerNorm, MaskedBatchNorm, RMSNorm

RNG = np.random.default_rng(0)
X, SCALE, BIAS = RNG.normal(2, 3, (2, 5, 8)), RNG.normal(1, 0.1, 8), RNG.normal(0, 0.1, 8)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * SCALE + BIAS


def rms_norm(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * SCALE


def batch_norm(x, eps):
    return (x - x[MASK].mean(0)) / np.sqrt(x[MASK].var(0) + eps) * SCALE + BIAS


NORMS = {
    "layer": (LayerNorm(0.1), ("scale", "bias"), (), lambda x: layer_norm(x, 0.1)),
    "layer without bias": (LayerNorm(0.1, False), ("scale",), (), lambda x: layer_norm(x, 0.1) - BIAS),
    "rms": (RMSNorm(0.1), ("scale",), (), lambda x: rms_norm(x, 0.1)),
    "batch": (MaskedBatchNorm(0.1), ("scale", "bias"), (MASK,), lambda x: batch_norm(x, 0.1)),
}


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-10), ("bfloat16", 2**-7)])
def test_formulas(dtype, bound):
    kind = np.dtype(jnp.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    with jax.enable_x64(dtype == "float64"):
        # bfloat16 statistics would be off by more than the deviation itself so far from 0
        x = (X * 0.5 + 100 if dtype == "bfloat16" else X).astype(kind)
        values = {"scale": SCALE.astype(kind), "bias": BIAS.astype(kind)}

        @jax.jit
        def run(x):
            apply = lambda module, names, rest, _: module.apply({"params": {n: values[n] for n in names}}, x, *rest)
            return {name: apply(*row) for name, row in NORMS.items()}

        for name, y in run(x).items():
            assert y.dtype == kind
            want = NORMS[name][3](x.astype(np.float64))
            if dtype == "bfloat16":  # the parameters are rounded too
                names, wide = NORMS[name][1], {n: v.astype(np.float64) for n, v in values.items()}
                want = (want - BIAS * ("bias" in names)) / SCALE * wide["scale"] + wide["bias"] * ("bias" in names)
            np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=bound, atol=bound, err_msg=name)


@pytest.mark.parametrize("module", [LayerNorm(), RMSNorm()])
def test_the_backward_pass_keeps_the_input_and_means(module, capsys):
    values = {"scale": jnp.ones(8), "bias": jnp.ones(8)}
    loss = lambda p, x: module.apply({"params": p}, jnp.sin(x)).sum()
    print_saved_residuals(loss, values, jnp.asarray(X, jnp.float32))
    lines = capsys.readouterr().out.splitlines()
    kept = [l for l in lines if l.startswith("f32[2,5,8]")]
    assert ["sin" in l for l in kept if "cos" not in l] == [True]  # cos is what sin keeps
    assert sum(l.startswith("f32[2,5] ") for l in lines) == (2 if isinstance(module, LayerNorm) else 1)


def test_another_rows_length_moves_batch_norm_and_not_layer_norm():
    batch, layer = MaskedBatchNorm(), LayerNorm()
    params = {"params": {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}}
    x = X.astype(np.float32)

    @jax.jit
    def run(mask):
        seen = jnp.where(mask[:, :, None], x, 0)  # what a shorter second row looks like
        return batch.apply(params, seen, mask)[0], layer.apply(params, seen)[0]

    (batch_a, layer_a), (batch_b, layer_b) = jax.device_get((run(MASK), run(np.ones_like(MASK))))
    np.testing.assert_array_equal(layer_a, layer_b)
    assert np.abs(batch_a - batch_b).max() > 0.1
