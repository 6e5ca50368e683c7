import jax
import numpy as np
import pytest

from llm_jax.nn import ties


def test_gradients_add_up_in_the_owner():
    a, x, y = (np.random.default_rng(i).normal(size=(2, 2)).astype(np.float32) for i in range(3))
    params = {"a": {"kernel": a}, "b": {"bias": np.zeros(2, np.float32)}}
    table = {"b/kernel": "a/kernel", "c": "a"}

    @jax.jit
    def grads(params):
        def loss(params):
            p = ties.expand(params, table)
            return (x * p["a"]["kernel"]).sum() + (y * p["b"]["kernel"]).sum() + 10 * p["c"]["kernel"].sum()

        return jax.grad(loss)(params)

    got = grads(params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    np.testing.assert_allclose(got["a"]["kernel"], x + y + 10, rtol=1e-6)


def test_tie_drops_what_expand_puts_back():
    full = {"a": {"k": 1, "z": 5}, "b": {"k": 1}, "c": {"d": {"k": 1}, "e": 2}}
    table = {"b/k": "a/k", "c/d/k": "a/k"}
    stored = ties.tie(full, table)
    assert stored == {"a": {"k": 1, "z": 5}, "c": {"e": 2}}
    assert ties.expand(stored, table) == full


@pytest.mark.parametrize(
    "call, table, words",
    [
        (ties.expand, {"b": "nowhere/k"}, "tie names 'nowhere/k'"),
        (ties.expand, {"b": "c", "c": "a"}, "'c' borrows from 'a' and cannot own 'b'"),
        (ties.tie, {"b": "a"}, "tie names 'b'"),
        (ties.tie, {"a": "nowhere"}, "tie names 'nowhere'"),
    ],
)
def test_errors(call, table, words):
    with pytest.raises(ValueError, match=words):
        call({"a": {"k": 1}}, table)
