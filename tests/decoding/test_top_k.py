"""The largest entries by blocks are the largest entries, ties in the same order."""

import jax
import numpy as np
import pytest

from llm_jax.decoding.top_k import top_k


@pytest.mark.parametrize("size, k", [(50, 7), (2048, 4), (5000, 3), (1000, 1)])
def test_equals_sorting(size, k):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(3, size)).astype(np.float32)
    x[1] = rng.integers(0, 5, size)  # nothing but ties
    x[2, : size - k - 1] = -np.inf  # hardly anything may be chosen
    values, index = jax.jit(top_k, static_argnums=1)(x.T, k)
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, 1))
