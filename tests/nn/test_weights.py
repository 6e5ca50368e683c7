"""The weight protocol: the hand-written product, structured weights, declaring parameters."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct
from jax.sharding import PartitionSpec as P

from llm_jax.nn import weights
from llm_jax.parallel.mesh import make_mesh


class Scaled(weights.Weight):
    """`scale * base`, a structured weight over any other."""

    base: Any
    offset: Any = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    axes_kept: tuple[int, ...] = struct.field(pytree_node=False, default=(0, 1))

    def dense(self):
        return self.scale * weights.dense(self.base)

    @property
    def shape(self):
        return weights.shape_of(self.base)


class Silent(weights.Weight):
    value: Any


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(
    "transposed, lead, bound",
    [(False, (), 1e-5), (True, (2, 3), 1e-5), (False, (2, 3, 2), 1e-10), (True, (3,), 1e-10)],
)
def test_hand_written_gradient_equals_autodiff(transposed, lead, bound):
    with jax.enable_x64(bound < 1e-9):
        dtype = np.float64 if bound < 1e-9 else np.float32
        x, w = normal(*lead, 4, dtype=dtype), normal(4, 5, seed=1, dtype=dtype)
        w = w.T if transposed else w
        ours = weights.matmul_t if transposed else weights.matmul
        plain = lambda x, w: x @ (w.T if transposed else w)

        @jax.jit
        def both(x, w):
            loss = lambda f: lambda x, w: jnp.sum(jnp.sin(f(x, w)))
            return [(f(x, w), jax.grad(loss(f), (0, 1))(x, w)) for f in (ours, plain)]

        a, b = both(x, w)
        assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=bound), a, b)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradients_of_rows_sum_in_float32(dtype):
    """A frequent token's row: 5,000 ones, where bfloat16 alone would stand still at 256 and float16 at 2,048."""
    ids = np.where(np.arange(6000) < 5000, 1, np.arange(6000) % 3 + 2).reshape(6, 1000)
    loss = lambda w: weights.take(w, ids).astype(jnp.float32).sum()
    grad = jax.jit(jax.grad(loss))(jnp.ones((6, 2), dtype))
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad.astype(np.float32)[:, 0], np.bincount(ids.ravel(), minlength=6).astype(dtype))


@pytest.mark.parametrize("product", [weights.matmul, weights.matmul_t])
@pytest.mark.parametrize("argument, products", [((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_what_is_frozen_costs_no_product(product, argument, products):
    grad = jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argument)
    jaxpr = jax.make_jaxpr(grad)(normal(weights.FEW_ROWS + 1, 4), normal(4, 4))
    assert str(jaxpr).count("dot_general[") == products


@pytest.mark.parametrize("columns, turned", [(2, True), (3, False)])
def test_the_gradient_of_a_narrow_matrix_is_its_transposes(columns, turned):
    x, w, dy = normal(5, 3, 16), normal(16, columns, seed=1), normal(5, 3, columns, seed=2)
    grad = lambda w: jax.vjp(lambda w: weights.matmul(x, w), w)[1](dy)[0]
    np.testing.assert_allclose(jax.jit(grad)(w), np.einsum("bti,bto->io", x, dy), rtol=1e-5, atol=1e-5)
    assert (f"f32[{columns},16] = dot_general[" in str(jax.make_jaxpr(grad)(w))) == turned


@pytest.mark.parametrize("rows", [1, 2, weights.FEW_ROWS, weights.FEW_ROWS + 1])
def test_few_rows_keep_the_stored_matrix_in_place(rows):
    x, w = normal(rows, 1, 7), normal(5, 7, seed=1)
    y = jax.jit(weights.matmul_t)(x, w)
    assert y.shape == (rows, 1, 5)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)
    text = jax.jit(weights.matmul_t).lower(x, w).as_text()
    assert ("optimization_barrier" in text) == (1 < rows <= weights.FEW_ROWS)


def test_transposed_is_the_same_matrix():
    w = normal(4, 5)
    turned = weights.Transposed(jnp.asarray(w.T))
    x, y, ids = normal(3, 4, seed=1), normal(3, 5, seed=2), np.array([[3, 0]])
    np.testing.assert_allclose(weights.matmul(x, turned), x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights.matmul_t(y, turned), y @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights.take(turned, ids), w[ids])
    np.testing.assert_array_equal(weights.dense(turned), w)
    assert weights.shape_of(turned) == (4, 5)
    assert weights.axes_of(turned, P("embed", "mlp")).transpose == P("mlp", "embed")


def test_inside_shard_map_operands_that_vary_over_different_axes():
    mesh = make_mesh({"data": 4, "model": 2})
    x, w = normal(8, 3), normal(3, 6, seed=1)
    loss = lambda x, w: jnp.sum(jnp.sin(weights.matmul(x, w)))
    both = lambda x, w: (weights.matmul(x, w), *jax.grad(loss, (0, 1))(x, w))
    specs = P("data"), P(None, "model")
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=(P("data", "model"), *specs)))
    y, dy = x @ w, np.cos(x @ w)
    for got, want in zip(sharded(x, w), (y, dy @ w.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_structured_weights_nest_and_multiply():
    base = normal(4, 5)
    w = Scaled(Scaled(base, scale=2.0), scale=3.0)
    x, y, ids = normal(2, 3, 4, seed=1), normal(2, 3, 5, seed=2), np.array([[3, 0]])
    np.testing.assert_allclose(weights.matmul(x, w), x @ (6 * base), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.matmul_t(y, w), y @ (6 * base).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.take(w, ids), 6 * base[ids], rtol=1e-6)
    np.testing.assert_allclose(weights.dense(w), 6 * base, rtol=1e-6)
    assert weights.shape_of(w) == (4, 5)
    assert weights.axes_of(w, P("embed", "mlp")).base.base == P("embed", "mlp")


def test_a_node_that_lacks_its_matrix_says_so():
    with pytest.raises(TypeError, match="Silent does not say what its matrix is"):
        weights.matmul(normal(2, 2), Silent(normal(2, 2)))
    with pytest.raises(TypeError, match="Silent does not say its shape"):
        weights.shape_of(Silent(normal(2, 2)))


def test_cast_count_bytes():
    tree = {"w": Scaled(normal(2, 3)), "ids": np.arange(4, dtype=np.int32), "b": normal(5)}
    half = weights.cast(tree, jnp.bfloat16)
    assert half["w"].base.dtype == half["b"].dtype == jnp.bfloat16 and half["ids"].dtype == np.int32
    assert weights.cast(tree, None) is tree
    assert weights.count(tree) == 6 + 4 + 5
    assert weights.bytes_of(half) == 2 * 6 + 4 * 4 + 2 * 5
    assert weights.bytes_of(jax.eval_shape(lambda: half)) == weights.bytes_of(half)


def test_replace_walks_structured_weights_as_one_leaf():
    tree = {"a": {"kernel": normal(2, 3), "bias": normal(3)}, "b": {"kernel": Scaled(normal(2, 3), scale=2.0)}}
    seen = []
    new = weights.replace(tree, "kernel", lambda path, w: seen.append(path) or Scaled(w, scale=5.0))
    assert seen == ["a/kernel", "b/kernel"] and new["a"]["bias"] is tree["a"]["bias"]
    np.testing.assert_allclose(weights.dense(new["b"]["kernel"]), 10 * tree["b"]["kernel"].base)
    with pytest.raises(ValueError, match="'scale' matches no parameter"):
        weights.replace(tree, "scale", lambda p, w: w)


def test_structure_and_build_round_trip_through_json():
    tree = {"a": {"kernel": Scaled(Scaled(normal(2, 3), scale=2.0), offset=normal(3), scale=0.5, axes_kept=(1,))}}
    described = json.loads(json.dumps(weights.structure(tree)))
    assert list(described) == ["a/kernel"]
    assert described["a/kernel"]["fields"].keys() == {"base", "offset"}
    leaves = dict(weights.paths.flatten(tree))
    again = weights.build(described["a/kernel"], leaves.__getitem__, "a/kernel")
    assert jax.tree.structure(again) == jax.tree.structure(tree["a"]["kernel"])
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tree["a"]["kernel"]))
    with pytest.raises(ValueError, match="a/kernel: unknown weight type 'elsewhere.Thing'"):
        weights.build({**described["a/kernel"], "type": "elsewhere.Thing"}, leaves.__getitem__, "a/kernel")


class Table(nn.Module):
    @nn.compact
    def __call__(self):
        return weights.parameter(self, "table", nn.initializers.ones, (2, 3), ("vocab", None))


def test_parameter_declares_axes_reads_nodes_and_checks_shapes():
    params, axes = weights.split_axes(Table().init(jax.random.key(0))["params"])
    assert axes == {"table": P("vocab", None)} and params["table"].shape == (2, 3)
    node = Scaled(normal(2, 3))
    assert Table().apply({"params": {"table": node}}).base is node.base
    with pytest.raises(ValueError, match=r"table has shape \(3, 2\), the config asks for \(2, 3\)"):
        Table().apply({"params": {"table": Scaled(normal(3, 2))}})


def test_boxes_gain_and_lose_axes():
    box = weights.Boxed(np.zeros(3), ("embed",))
    stacked = box.add_axis(0, {"name": "layers"})
    assert stacked.names == ("layers", "embed") and stacked.remove_axis(0, {}).names == ("embed",)
    assert weights.split_axes({"a": np.zeros((2, 2))})[1] == {"a": P(None, None)}


def test_a_traced_product_is_differentiated_by_other_operands_later():
    """One trace of a loop: gradients of both factors, then of the second alone, whose first then is no residual."""

    def run(product, x, factors):
        step = lambda x, w: (jnp.tanh(product(product(x, w[0]), w[1])), None)
        return jax.lax.scan(step, x, factors)[0]

    ours = jax.jit(lambda x, factors: run(weights.matmul, x, factors))
    x, a, b = jnp.ones((2, 3)), jnp.full((2, 3, 4), 0.1), jnp.full((2, 4, 3), 0.2)
    loss = lambda a, b: jnp.sum(ours(x, (a, b)))
    plain = lambda a, b: jnp.sum(run(jnp.matmul, x, (a, b)))
    for chosen in ((0, 1), 1, 0):
        for got, want in zip(*(jax.tree.leaves(jax.grad(f, chosen)(a, b)) for f in (loss, plain)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
