"""A realized node becomes parameters before the model, and gradients find the way back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from llm_jax.nn import realized, weights
from llm_jax.nn.linear import Linear
from llm_jax.nn.realized import Realized, realize
from llm_jax.training.trainable import combine, partition

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)


class Product(Realized):
    """Two factors, one float that stays, and a static name."""

    u: Any
    v: Any
    name: str = struct.field(pytree_node=False, default="table")

    def realize(self):
        return {self.name: self.u @ self.v, "count": jnp.int32(3)}


class Twice(Realized):
    """A node around another, or around an array."""

    inner: Any

    def realize(self):
        return jax.tree.map(lambda x: 2 * x, realize(self.inner))


class Plus(weights.Weight):
    """A structured weight over a base that may be realized."""

    base: Any
    more: Any
    spare: Any = None

    def dense(self):
        return self.base + self.more

    @property
    def shape(self):
        return self.more.shape


TREE = {
    "plain": {"kernel": normal(3, 4)},
    "made": Product(normal(3, 2), normal(2, 4)),
    "nested": {"kernel": Plus(Twice(Twice(normal(3, 4))), normal(3, 4))},
    "frozen": Twice(normal(3, 4)),
}


def by_hand(tree):
    made, nested = tree["made"], tree["nested"]["kernel"]
    return {
        "plain": tree["plain"],
        "made": {"table": made.u @ made.v, "count": np.int32(3)},
        "nested": {"kernel": Plus(4 * nested.base.inner.inner, nested.more)},
        "frozen": 2 * tree["frozen"].inner,
    }


def test_nodes_become_parameters_wherever_they_stand():
    got, want = realize(TREE), by_hand(TREE)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    assert not realized.has_any(got) and realize(got) is got
    shapes = realized.shapes(jax.eval_shape(lambda: TREE))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(jnp.shape, want)


def test_gradients_go_back_to_what_trains():
    """Through whole nodes and parts of them; in the split, what is frozen or an integer is not differentiated."""

    def loss(params):
        made, nested = params["made"]["table"], weights.dense(params["nested"]["kernel"])
        return jnp.sum(jnp.sin(params["plain"]["kernel"] + made) * nested + params["frozen"])

    trainable, frozen = partition(TREE, ("plain/kernel", "made/u", "nested/*"))

    @jax.jit
    def both(trainable, frozen):
        direct = jax.grad(lambda t: loss(realize(combine(t, frozen))))(trainable)
        learn, rest, pull = realized.split(trainable, frozen)
        grads = jax.grad(lambda learn: loss(combine(learn, rest)))(learn)
        wide = jax.tree.map(lambda g: g.astype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32), grads)
        return direct, pull(wide), learn, rest

    direct, pulled, learn, rest = jax.device_get(both(trainable, frozen))
    assert jax.tree.structure(direct) == jax.tree.structure(pulled) == jax.tree.structure(trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), pulled, direct)
    assert learn["made"]["count"] is None and rest["made"]["count"] == 3 and rest["made"]["table"] is None
    assert learn["frozen"] is None and pulled["made"].v is None and np.abs(pulled["made"].u).max() > 0
    assert np.abs(pulled["nested"]["kernel"].base.inner.inner).max() > 0


def test_axes_keep_the_layers_and_nothing_else():
    node = Twice(np.zeros((2, 3, 4)))
    assert node.axes(weights.Axes("layers", "embed", "heads")).inner == weights.Axes("layers", None, None)
    assert node.axes(weights.Axes("embed", "heads")).inner == weights.Axes(None, None, None)
    assert node.axes(None).inner == weights.Axes(None, None, None)
    assert Twice(np.float32(2)).axes(None).inner == weights.Axes()


def test_a_model_refuses_what_is_not_realized():
    with pytest.raises(TypeError, match="Twice is not realized: call nn.realized.realize.params. before the model"):
        Linear(4, ("embed", "mlp"), False).apply({"params": {"kernel": Twice(normal(3, 4))}}, normal(2, 3))
    with pytest.raises(TypeError, match="Realized does not say what it becomes: define realize"):
        Realized().realize()
