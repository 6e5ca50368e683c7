from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import weights
from llm_jax.nn.linear import Linear

RNG = np.random.default_rng(0)
X, W, B = (RNG.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (4, 5), (5,)))


class Listening(weights.Weight):
    """Adds 1 to the product when it is given a key."""

    base: Any

    @property
    def shape(self):
        return self.base.shape

    def matmul(self, x, key=None):
        return weights.matmul(x, self.base) + (0 if key is None else 1)


@pytest.mark.parametrize("dtype, bound", [(np.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_formula_in_the_dtype_of_the_input(use_bias, dtype, bound):
    layer = Linear(5, ("embed", "mlp"), use_bias)
    params = {"kernel": W, **({"bias": B} if use_bias else {})}
    y = jax.jit(layer.apply)({"params": params}, X.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(y).astype(np.float32), X @ W + (B if use_bias else 0), rtol=bound, atol=bound * 4
    )


def test_axes_and_sizes():
    params, axes = weights.split_axes(
        jax.eval_shape(lambda: Linear(5, ("embed", "mlp")).init(jax.random.key(0), X))["params"]
    )
    assert {k: v.shape for k, v in params.items()} == {"kernel": (4, 5), "bias": (5,)}
    assert axes == {"kernel": weights.Axes("embed", "mlp"), "bias": weights.Axes("mlp")}
    with pytest.raises(ValueError, match=r"kernel has shape \(5, 4\), the config asks for \(4, 5\)"):
        Linear(5, ("embed", "mlp")).apply({"params": {"kernel": W.T, "bias": B}}, X)


@pytest.mark.parametrize("rngs", [{}, {"dropout": jax.random.key(0)}])
def test_a_structured_weight_gets_a_key_iff_the_stream_exists(rngs):
    params = {"kernel": Listening(W)}
    y = jax.jit(Linear(5, ("embed", "mlp"), use_bias=False).apply)({"params": params}, X, rngs=rngs)
    np.testing.assert_allclose(y, X @ W + (1 if rngs else 0), rtol=1e-5, atol=1e-5)
