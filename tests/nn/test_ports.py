"""A port is the identity until a node stands under its name."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.nn import ports, weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import Attention, AttentionConfig, View
from llm_jax.nn.feed_forward import FeedForward
from llm_jax.nn.stack import Stack, unstack

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
AT = np.broadcast_to(np.arange(3, dtype=np.int32), (2, 3))
MODULES = {
    "mlp": (FeedForward(6, "relu"), lambda out: out, ()),
    "attention": (Attention(AttentionConfig(4, 2, 1, 2)), lambda out: out[0], (View(Mask(AT, AT)),)),
}


class Add(ports.PortNode):
    """Adds a vector, and so differs from the identity."""

    value: Any

    def __call__(self, x):
        return x + self.value.reshape(1, 1, -1)


class Block(FeedForward):
    def __call__(self, x, per_layer, train=False):
        return super().__call__(x), None


@pytest.mark.parametrize("name", MODULES)
def test_an_attached_node_changes_the_output_and_nothing_else_does(name):
    module, first, rest = MODULES[name]
    value = np.arange(4, dtype=np.float32)
    params = random_params(module, X, *rest)
    run = lambda p: first(module.apply({"params": p}, X, *rest))

    @jax.jit
    def every(params):
        return run(params), *(run({**params, port: Add(value)}) for port in ("adapter", "parallel_adapter"))

    plain, sequential, parallel = jax.device_get(every(params))
    np.testing.assert_allclose(sequential, plain + value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(parallel, plain + X + value, rtol=1e-6, atol=1e-6)


def test_a_node_in_a_stack_has_a_layer_axis():
    stack = Stack(functools.partial(Block, 6, "relu"), 2)
    params = random_params(stack, X)
    added = np.arange(8, dtype=np.float32).reshape(2, 4)
    params = {"layers": {**params["layers"], "adapter": Add(added)}}

    @jax.jit
    def run(params):
        want = X
        for i in range(2):
            layer = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
            node = layer.pop("adapter")
            want = FeedForward(6, "relu").apply({"params": layer}, want) + node.value.reshape(1, 1, 4)
        return want, *(stack.apply({"params": p}, X)[0] for p in (params, unstack(params)))

    want, scanned, unrolled = jax.device_get(run(params))
    np.testing.assert_allclose(scanned, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(unrolled, want, rtol=1e-6, atol=1e-6)


def test_what_is_no_node_is_refused():
    params = random_params(MODULES["mlp"][0], X)
    with pytest.raises(TypeError, match="adapter is a port and takes a PortNode, not ndarray"):
        FeedForward(6, "relu").apply({"params": {**params, "adapter": np.zeros(4, np.float32)}}, X)
    with pytest.raises(TypeError, match="PortNode does not say what it computes"):
        ports.PortNode()(X)


def test_axes_are_replicated_unless_a_node_says_more():
    assert Add(np.zeros((2, 4))).axes().value == weights.Axes(None, None)
