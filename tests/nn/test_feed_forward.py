"""Plain and gated feed-forward layers against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from llm_jax.nn.feed_forward import ACTIVATIONS, FeedForward

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
ERF = np.vectorize(math.erf)
FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
PARAMS = {
    name: {
        "kernel": RNG.normal(size=(i, o)).astype(np.float32),
        "bias": RNG.normal(size=o).astype(np.float32),
    }
    for name, i, o in (("up", 4, 6), ("gate", 4, 6), ("down", 6, 4))
}


def formula(activation, gated, use_bias):
    linear = lambda name, x: x @ PARAMS[name]["kernel"] + (PARAMS[name]["bias"] if use_bias else 0)
    up = linear("up", X.astype(np.float64))
    act = FORMULAS[activation]
    return linear("down", act(linear("gate", X.astype(np.float64))) * up if gated else act(up))


def params_of(gated, use_bias):
    names = ["up", "down"] + ["gate"] * gated
    return {n: {k: v for k, v in PARAMS[n].items() if use_bias or k == "kernel"} for n in names}


@pytest.mark.parametrize(
    "activation, gated, use_bias",
    [("gelu", False, True), ("gelu_tanh", True, False), ("relu", False, False), ("silu", True, True)],
)
def test_formula(activation, gated, use_bias):
    module = FeedForward(6, activation, gated, use_bias)
    y = jax.jit(module.apply)({"params": params_of(gated, use_bias)}, X)
    np.testing.assert_allclose(y, formula(activation, gated, use_bias), rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), X))["params"]
    assert {k: set(v) for k, v in shapes.items()} == {k: set(v) for k, v in params_of(gated, use_bias).items()}


def test_a_wide_layer_in_float16_equals_float32_past_65504():
    """Values and gradients: the product of gate and up passes float16's range, and the down product again."""
    half = jax.tree.map(lambda x: (x * 300).astype(np.float16), params_of(True, False))
    x = X.astype(np.float16)

    def run(params, x):
        return FeedForward(6, "gelu_tanh", True, False, wide=True).apply({"params": params}, x)

    grad = lambda params, x: jax.grad(lambda p: run(p, x).sum() / 2**20)(params)
    both = jax.jit(lambda params, x: (run(params, x), grad(params, x)))
    whole = jax.tree.map(lambda x: x.astype(np.float32), half)
    (got, grads), (want, wanted) = both(half, x), both(whole, x.astype(np.float32))
    assert got.dtype == jnp.float32 and abs(want).max() > 65504
    np.testing.assert_allclose(got, want, rtol=0, atol=0.005 * abs(want).max())
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.005 * abs(b).max())
    jax.tree.map(close, grads, wanted)


def test_every_activation_has_a_formula():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("gated", [False, True])
def test_what_the_backward_pass_keeps(gated, capsys):
    """The products before the activation and nothing behind them: what the down kernel reads is computed again."""
    module = FeedForward(6, "gelu", gated)
    params = jax.tree.map(jnp.asarray, params_of(gated, True))
    loss = lambda p: jnp.sum(module.apply({"params": p}, jnp.asarray(X)))
    print_saved_residuals(loss, params)
    assert sum(",6]" in l and "argument" not in l for l in capsys.readouterr().out.splitlines()) == 1 + gated
