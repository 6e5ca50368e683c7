"""A port changes nothing until a node stands under its name; then the node gets what published adapters read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_models import random_params

from llm_jax.nn import ports, weights
from llm_jax.nn.feed_forward import FeedForward
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.stack import Stack, unstack

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
VALUE = np.arange(1, 5, dtype=np.float32)


class Host(nn.Module):
    """A pre-norm sublayer with its sum."""

    @nn.compact
    def __call__(self, x, per_layer=None, train=False):
        norm, mlp = LayerNorm(1e-5, name="norm"), FeedForward(6, "relu", name="mlp")
        inputs = norm(x)
        return x + ports.through(mlp, mlp(inputs), inputs, x, norm, train), None


class Mix(ports.PortNode):
    """A sum of everything that a node is given, each with its own factor."""

    value: Any

    def __call__(self, x, residual, norm, key):
        drawn = 0.0 if key is None else jax.random.uniform(key)
        v = self.value
        return v[0] * x + v[1] * residual + v[2] * norm(residual + x) + v[3] + drawn


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def by_hand(x, params, adapter=None, parallel=None):
    norm = lambda z: layer_norm(z, params["norm"])
    up, down = params["mlp"]["up"], params["mlp"]["down"]
    y = np.maximum(norm(x) @ up["kernel"] + up["bias"], 0) @ down["kernel"] + down["bias"]
    mix = lambda v, z: v[0] * z + v[1] * x + v[2] * norm(x + z) + v[3]
    y = y if adapter is None else mix(adapter, y)
    y = y if parallel is None else y + mix(parallel, norm(x))
    return x + y


def attached(params, **nodes):
    return {**params, "mlp": {**params["mlp"], **{name: Mix(value) for name, value in nodes.items()}}}


def test_nodes_get_input_or_output_residual_and_norm():
    params = random_params(Host(), X)
    trees = [params, attached(params, adapter=VALUE), attached(params, parallel_adapter=VALUE[::-1])]
    trees.append(attached(params, adapter=VALUE, parallel_adapter=VALUE[::-1]))
    got = jax.device_get(jax.jit(lambda trees: [Host().apply({"params": p}, X)[0] for p in trees])(trees))
    given = [(None, None), (VALUE, None), (None, VALUE[::-1]), (VALUE, VALUE[::-1])]
    for out, nodes in zip(got, given, strict=True):
        np.testing.assert_allclose(out, by_hand(X, params, *nodes), rtol=1e-5, atol=1e-5)


def test_a_key_while_training_only_and_another_for_each_node():
    params = attached(random_params(Host(), X), adapter=VALUE * 0, parallel_adapter=VALUE * 0)
    run = lambda train: Host().apply({"params": params}, X, train=train, rngs={"dropout": jax.random.key(1)})[0] - X
    still, first = jax.device_get(jax.jit(lambda: (run(False), run(True)))())
    assert not still.any() and np.ptp(first) == pytest.approx(0, abs=1e-6)
    alone = {**params, "mlp": {k: v for k, v in params["mlp"].items() if k != "parallel_adapter"}}
    only = Host().apply({"params": alone}, X, train=True, rngs={"dropout": jax.random.key(1)})[0] - X
    assert 0 < float(only[0, 0, 0]) < 1 and abs(first[0, 0, 0] - 2 * float(only[0, 0, 0])) > 1e-3


def test_the_output_keeps_its_dtype():
    params = attached(random_params(Host(), X), adapter=VALUE)
    half = {
        **params,
        "mlp": {k: weights.cast(v, jnp.bfloat16) if k != "adapter" else v for k, v in params["mlp"].items()},
    }
    out = jax.eval_shape(lambda p: Host().apply({"params": p}, X.astype(jnp.bfloat16))[0], half)
    assert out.dtype == jnp.bfloat16


def test_a_node_in_a_stack_has_a_layer_axis():
    stack = Stack(functools.partial(Host), 2)
    params = random_params(stack, X)
    added = np.arange(8, dtype=np.float32).reshape(2, 4) / 4
    params = {"layers": attached(params["layers"], adapter=added)}
    run = jax.jit(lambda trees: [stack.apply({"params": p}, X)[0] for p in trees])
    want = X
    for i in range(2):
        layer = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
        want = by_hand(want, layer, layer["mlp"].pop("adapter").value)
    for got in jax.device_get(run([params, unstack(params)])):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_no_node_is_refused():
    params = random_params(Host(), X)
    with pytest.raises(TypeError, match="mlp/adapter is a port and takes a PortNode, not ndarray"):
        Host().apply({"params": {**params, "mlp": {**params["mlp"], "adapter": VALUE}}}, X)
    with pytest.raises(TypeError, match="PortNode does not say what it computes"):
        ports.PortNode()(X, X, lambda x: x, None)


def test_axes_are_replicated_unless_a_node_says_more():
    assert Mix(np.zeros((2, 4))).axes().value == weights.Axes(None, None)
