"""Gathers and staged reduce-scatters written out: equal to the compiler's, and what the program then moves."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from plan_runs import MODELS_HERE, assert_equals_one_device, compiled, program, run_steps
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS

from llm_jax.models.shared.block import Shared
from llm_jax.nn import paths
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import View
from llm_jax.nn.execution import Execution
from llm_jax.nn.relative import Bias
from llm_jax.nn.relative_scores import Distances
from llm_jax.parallel import explicit
from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.pipeline import interpreter
from llm_jax.parallel.plan import PlanConfig
from llm_jax.parallel.rules import is_spec
from llm_jax.rehearse import hlo

ROWS = {
    "zero 3": (PlanConfig(data=8, zero=3, explicit=True, remat="full"), "llama", 1),
    "replicas, tensor 2, remat": (
        PlanConfig(replica=2, data=2, model=2, zero=3, explicit=True, remat="full"),
        "llama",
        1,
    ),
    "encoder-decoder, accumulation": (PlanConfig(data=8, zero=3, explicit=True, remat="full"), "t5", 2),
    "turned": (PlanConfig(replica=4, data=2, zero=3, explicit=True, remat="full"), "llama_wide", 1),
    "padded rows": (PlanConfig(data=4, model=2, zero=3, explicit=True, remat="dots"), "bert", 1),
}


@pytest.mark.parametrize("row", ROWS)
def test_equals_one_device(row):
    plan, name, accumulation = ROWS[row]
    assert_equals_one_device(*run_steps(plan, name, accumulation), name, accumulation)


def test_columns_of_whole_tiles_come_before_rows_of_parts():
    """12 rows a device would be padded to 16; 16 columns are turned into 16 rows."""
    own = {}
    for on in (False, True):
        plan, made = program(PlanConfig(replica=4, data=2, zero=3, explicit=on, remat="full"), "llama_wide")
        own[on] = dict(paths.flatten(plan.specs(made.params, made.axes, True), lambda x: isinstance(x, P)))
    down = "decoder/layers/mlp/down/kernel"
    assert (own[False][down], own[True][down]) == (P(None, "data", None), P(None, None, "data"))
    assert {path for path in own[True] if own[True][path] != own[False][path]} == {down}


def test_gradients_of_layers_are_scattered():
    """Every matrix of a layer is gathered twice, forward and backward, and its gradient scattered once."""
    _, made, step = compiled(*ROWS["zero 3"])
    found = hlo.collectives(step.as_text())
    of = lambda kind: sum(c.times * c.size for c in found if c.kind == kind and "decoder/shard_map" in c.where)
    layers = made.shapes.params["decoder"]["layers"]
    matrices = sum(x.size * 4 for x in jax.tree.leaves(layers) if x.ndim == 3)
    norms = sum(x.size * 4 for x in jax.tree.leaves(layers) if x.ndim == 2)
    assert of("reduce-scatter") == matrices + norms
    assert of("all-gather") == 2 * (matrices + norms)
    table = 4 * made.shapes.params["embed"]["embedding"].size  # read by the first layer and, tied, by the last
    outside = [c for c in found if "shard_map" in c.where and "decoder/" not in c.where]
    moved = lambda kind: sum(c.times * c.size for c in outside if c.kind == kind)
    assert (moved("all-gather"), moved("reduce-scatter")) == (table, 2 * table)  # equal gathers are one to the compiler
    assert moved("all-reduce") == 0


def torus(*sizes, order=None):
    """A mesh of devices that lie on a torus, as `make_mesh` sorts them."""
    where = list(np.ndindex(*sizes))
    devices = [SimpleNamespace(coords=tuple(reversed(c))) for c in where]
    array = np.empty(len(devices), object)
    array[:] = [devices[i] for i in order] if order is not None else devices
    return SimpleNamespace(
        devices=array.reshape(1, -1, 1), axis_names=("replica", "data", "model"), shape={"data": len(devices)}
    )


def test_one_stage_for_each_dimension_of_the_torus():
    assert explicit.stages(torus(2, 3), "data") == (((0, 3), (1, 4), (2, 5)), ((0, 1, 2), (3, 4, 5)))
    assert [len(groups[0]) for groups in explicit.stages(torus(4, 2, 8), "data")] == [4, 2, 8]
    assert explicit.stages(torus(1, 6), "data") == ((tuple(range(6)),),)
    assert explicit.stages(torus(2, 3, order=[1, 0, 2, 3, 4, 5]), "data") == ((tuple(range(6)),),)
    assert explicit.stages(make_mesh({"data": 8}), "data") == ((tuple(range(8)),),)


@pytest.mark.parametrize("sizes", [(2, 4), (2, 2, 2)])
def test_stages_leave_everyone_with_its_own_block(sizes):
    scatter = explicit.stages(torus(*sizes), "data")
    mesh = make_mesh({"data": 8})
    x = jnp.arange(16.0 * 3).reshape(3, 16)
    weight = np.random.default_rng(0).normal(size=(8, 3, 16)).astype(np.float32)

    def loss(x, weight):
        inside = lambda x, w: jnp.sum(explicit.gather(x, 1, scatter) * w[0])[None]
        run = jax.shard_map(
            inside, mesh=mesh, in_specs=(P(None, "data"), P("data")), out_specs=P("data"), check_vma=False
        )
        return jnp.sum(run(x, weight))

    value, grad = jax.jit(jax.value_and_grad(loss))(x, weight)
    np.testing.assert_allclose(value, np.sum(np.asarray(x) * weight), rtol=1e-5)
    np.testing.assert_allclose(grad, weight.sum(0), rtol=1e-5)


def test_what_has_no_rows_is_declared():
    index = jnp.zeros((8, 4), jnp.int32)
    positions = (Bias(jnp.zeros((8, 8, 4, 4))), Distances(jnp.zeros((8, 2))))
    shared = Shared(View(Mask(index, index), positions=positions))
    rows = P(("replica", "data"))
    assert jax.tree.leaves(explicit._row_specs((shared,), 8), is_leaf=is_spec) == [rows, rows, rows, P()]


@pytest.mark.parametrize("name, config", {**MODELS, **ENCODERS, **ENCODER_DECODERS, **MODELS_HERE}.items())
def test_what_layers_share_has_rows_or_declares_that_it_has_none(name, config):
    """Whatever is as long as the batch by chance is not divided."""

    def context(rows):
        calls = []
        model = config.make(Execution(stack_runner=interpreter.taking(calls)))
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((rows, 6), np.int32))
        return [call.context[0] for call in calls]

    shared = context(5)
    leading = [(x.shape[0], y.shape[0]) for x, y in zip(*map(jax.tree.leaves, (shared, context(7))), strict=True)]
    assert (5, 7) in leading
    for size in {n for pair in leading for n in pair} - {1}:
        specs = jax.tree.leaves(explicit._row_specs(shared, size), is_leaf=is_spec)
        assert [spec != P() for spec in specs] == [pair == (5, 7) and size == 5 for pair in leading]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PlanConfig(zero=2, explicit=True), "plan.explicit is of zero=3, without plan.pipe"),
        (
            lambda: PlanConfig(zero=3, explicit=True),
            "would keep gathered layers with plan.remat=none: set full or dots",
        ),
        (
            lambda: run_steps(PlanConfig(data=8, zero=3, explicit=True, remat="full"), "albert"),
            "no place for layers that share",
        ),
        (lambda: run_steps(PlanConfig(data=8, zero=3, explicit=True, remat="full"), "xlnet"), "no place for memories"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
