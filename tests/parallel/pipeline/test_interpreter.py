"""Every schedule equals accumulation over the same micro-batches on one device: parameters, moments, losses, norms."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from plan_runs import assert_equals_one_device, compiled, run_steps

from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.pipeline import interpreter, schedules
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.rehearse import hlo

ROWS = {  # name: (plan, model); 5 layers are not a multiple of 4, dropout is on in `deep`
    "1f1b, 5 layers in 4, zero 1": (PlanConfig(data=2, pipe=4, schedule="1f1b", zero=1), "deep"),
    "interleaved, tied": (PlanConfig(data=4, pipe=2, schedule="interleaved", chunks=2), "deep_tied"),
    "bert, padded rows, zero bubble, zero 3, tensor 2": (
        PlanConfig(data=2, pipe=2, model=2, schedule="zero_bubble", microbatches=2, zero=3),
        "bert",
    ),
    "t5, two pipelines, zero 3": (PlanConfig(data=4, pipe=2, schedule="gpipe", zero=3), "t5"),
    "1f1b, zero 3, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="1f1b", zero=3), "deep_tied"),
    "zero bubble, replicas, zero 3": (
        PlanConfig(replica=2, data=2, pipe=2, schedule="zero_bubble", zero=3),
        "deep_tied",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_equals_accumulation(row):
    config, name = ROWS[row]
    assert_equals_one_device(*run_steps(config, name), name, config.make_schedule().micros)


@pytest.mark.parametrize(
    "name, v, layers",
    [("gpipe", 1, 16), ("1f1b", 1, 4), ("eager_1f1b", 1, 7), ("interleaved", 2, 8), ("zero_bubble", 1, 4)],
)
def test_places_of_inputs(name, v, layers):
    """Of 16 micro-batches in 4 stages: GPipe holds all, 1F1B as many as stages, eager 1F1B not quite twice as many."""
    places = schedules.slots(schedules.make(name, 4, 16, v))
    assert places == (1, layers, layers if name == "gpipe" else 1, layers if name == "zero_bubble" else 1)


def tanh(w, i, x, context):
    return jax.numpy.tanh(x @ w["w"]) + 0 * i


def sublayers(w, i, x, context):
    """Two residual sublayers of two products each."""
    x = x + jax.numpy.tanh(x @ w["a"]) @ w["b"]
    return x + jax.numpy.tanh(x @ w["c"]) @ w["d"]


@functools.cache
def toy(name, p=4, m=8, layer=tanh, kernels="w", layers=8):
    """A compiled schedule of wide layers and a square loss."""
    w = {k: np.ones((layers, 16, 16), np.float32) for k in kernels}
    s = schedules.make(name, p, m, 2 if name == "interleaved" else 1)
    mesh = make_mesh({"data": 8 // p, "pipe": p})
    x = np.ones((m, 64, 16), np.float32)
    finish = lambda outer, x, micro: ((x**2).sum() * outer, {"square": (x**2).sum()})
    run = jax.jit(
        lambda w, x: interpreter.run(s, mesh, layer, finish, w, np.float32(1), x, np.zeros((m, 1)), np.arange(m))
    )
    return run.lower(w, x).compile()


def test_1f1b_holds_fewer_activations_than_gpipe():
    """What flows into 2 layers, of 4 and not 8 micro-batches, and out of the last, of 1 and not 8; 2 KiB each."""
    gpipe, one = (toy(name).memory_analysis().temp_size_in_bytes / (64 * 16 * 4) for name in ("gpipe", "1f1b"))
    assert gpipe - one == pytest.approx((4 * 2 + 7) / 2, abs=0.5)


def test_sums_of_gradients_are_divided_where_zero_divides_gradients():
    """A stage's two layers' gradients, of which a device keeps a half."""
    config, name = ROWS["1f1b, 5 layers in 4, zero 1"]
    taken = {}
    for zero in (1, 2):
        _, made, step = compiled(dataclasses.replace(config, zero=zero), name)
        taken[zero] = step.memory_analysis().temp_size_in_bytes
    a_layer = sum(x.size * 4 for x in jax.tree.leaves(made.shapes.params["decoder"]["layers"])) / 5
    assert taken[1] - taken[2] >= 2 * a_layer / 2


def test_stages_gather_a_layer_at_a_time():
    """Inside a turn: a stage's matrices would be as much memory again as ZeRO-3 saves."""
    plan, made, step = compiled(PlanConfig(data=4, pipe=2, zero=3), "deep_tied")
    found = hlo.collectives(step.as_text(), {turn: 1.0 for turn in schedules.TURNS})
    gathers = [c for c in found if c.kind == "all-gather" and c.where.endswith(("all_gather", "sharding_constraint"))]
    layers = [x.size * 4 for x in jax.tree.leaves(made.shapes.params["decoder"]["layers"]) if x.ndim > 2]
    inside = [c for c in gathers if "turn_" in c.where]
    assert max(c.size for c in inside) == max(layers) / 4
    assert sum(c.size * c.times for c in inside) == len(plan.schedule.ticks) * 2 * sum(layers) / 2  # forward and back
    rest = sum(x.size * 4 for x in jax.tree.leaves(made.shapes.params)) - sum(layers)  # tables and vectors
    assert sum(c.size * c.times for c in gathers if c not in inside) <= rest


def test_products_of_a_tick():
    """Of layers of two residual sublayers, four products each: what F, B, and zero bubble's B and W compute."""

    def products(name, turn):
        text = hlo.parse(toy(name, 1, 1, sublayers, "abcd", 3).as_text())
        times = text.calls({name: float(name == turn) for name in schedules.TURNS})
        dots = sum(times[name] for name, body in text.computations.items() for i in body.values() if i.opcode == "dot")
        return dots / len(schedules.make(name, 1, 1).ticks)

    assert products("1f1b", "F") == products("zero_bubble", "F") == 3 * 4  # one unit
    assert products("1f1b", "B") == 3 * 11  # not quite three: the last product again is for nobody
    assert products("zero_bubble", "B") == 3 * 7
    assert products("zero_bubble", "W") == 3 * 10  # two and a half: a layer's inner gradients again


@pytest.mark.parametrize("row", ["bert, padded rows, zero bubble, zero 3, tensor 2", "1f1b, zero 3, tensor 2"])
def test_turns_permute_nothing(row):
    """A permutation waits for all devices, also for those that are at other turns."""
    found = hlo.collectives(compiled(*ROWS[row])[2].as_text())
    inside = [c.kind for c in found if "turn_" in c.where]
    assert "all-reduce" in inside and "collective-permute" not in inside


def test_neighbours_exchange_once_a_tick():
    """One permutation each way a tick, of a device's half of a micro-batch, and nothing else along `pipe` there."""
    s = schedules.make("1f1b", 4, 8)
    found = hlo.collectives(toy("1f1b").as_text())
    sent = [c for c in found if c.kind == "collective-permute" and c.times == len(s.ticks)]
    assert sum(c.size * c.times for c in sent) == 2 * len(s.ticks) * 64 / 2 * 16 * 4
    mesh = make_mesh({"data": 2, "pipe": 4})
    assert all(c.times == 1 for c in found if c not in sent and "pipe" in hlo.axes_of(c.groups, mesh))


def test_half_precision():
    """Sums over `pipe` of bfloat16 gradients, of inputs and of contexts, equal those without a pipeline."""
    mesh = make_mesh({"data": 4, "pipe": 2})
    rng = np.random.default_rng(0)
    w, x, context = (jax.numpy.asarray(rng.normal(size=s), "bfloat16") for s in ((4, 8, 8), (4, 8, 8), (4, 8, 8)))
    layer = lambda w, i, x, context: jax.numpy.tanh(x @ w + context)
    finish = lambda outer, x, micro: ((x.astype("float32") ** 2).sum(), {})

    def scheduled(w, x, context):
        s = schedules.make("1f1b", 2, 4)
        found = interpreter.run(s, mesh, layer, finish, w, {}, x, context, np.arange(4))
        return found.layers, found.inputs, *found.contexts

    def in_sequence(w, x, context):
        return finish(None, interpreter.forward(mesh, layer, w, x, context), None)[0]

    def plain(w, x, context):
        for i in range(4):
            x = layer(w[i], i, x, context)
        return finish(None, x, None)[0]

    run = lambda *a: (scheduled(*a), jax.grad(in_sequence, (0, 1, 2))(*a), jax.grad(plain, (0, 1, 2))(*a))
    *pipelines, want = jax.jit(run)(w, x, context)
    for got in pipelines:
        for a, b in zip(got, want, strict=True):
            a, b = np.float32(a), np.float32(b)
            np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


def test_half_precision_of_layers_that_gather_themselves():
    config = PlanConfig(replica=2, data=2, pipe=2, zero=3, precision="bf16")
    _, got = run_steps(config, "deep_tied")
    micros, one = config.make_schedule().micros, PlanConfig(data=1, precision="bf16")
    _, want = run_steps(one, "deep_tied", micros, jax.devices()[:1])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-2)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        (
            "t5",
            {"schedule": "1f1b"},
            "schedule=1f1b needs one stack of layers, the model has 2 .*set plan.schedule=gpipe",
        ),
        ("xlnet", {}, "what runs on from batch to batch .* has no place in it"),
        ("deep", {"data": 2, "model": 2}, "plan.pipe=2 needs heads that divide by plan.model=2: there are 3 query"),
    ],
)
def test_models_that_do_not_fit(name, changes, words):
    with pytest.raises(ValueError, match=words):
        run_steps(PlanConfig(**{"data": 4, "pipe": 2, **changes}), name)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"pipe": 4, "microbatches": 2}, "plan.microbatches=2 leave stages of plan.pipe=4 idle: take 4 or more"),
        ({"pipe": 2, "unroll": True}, "plan.pipe and plan.unroll exclude each other"),
        ({"microbatches": 4}, "are of a pipeline: set plan.pipe"),
        ({"pipe": 2, "chunks": 2}, "schedule=1f1b with chunks=2"),
        (
            {"pipe": 2, "schedule": "pipedream"},
            "schedule='pipedream' is not one of gpipe, 1f1b, eager_1f1b, interleaved, zero_bubble",
        ),
    ],
)
def test_plans_that_do_not_fit(fields, words):
    with pytest.raises(ValueError, match=words):
        PlanConfig(**fields)


def test_batches_that_do_not_fit():
    plan = Plan(PlanConfig(data=4, pipe=2), object())
    with pytest.raises(ValueError, match=r"batch_size=8 does not divide by 16 \(data=4 x microbatches=4\)"):
        plan.check_batch(8)
    with pytest.raises(ValueError, match="training.accumulation=2 with plan.pipe: set plan.microbatches"):
        plan.check_batch(32, 2)


def test_parameters_of_their_own_are_no_stages():
    with pytest.raises(interpreter.PipelineError, match="layers that differ cannot be stages; stack them"):
        interpreter.stacks({"decoder": {"layers": {"0": {}, "1": {}}}})
    with pytest.raises(interpreter.PipelineError, match="the model has no stack of layers"):
        interpreter.stacks({"embed": {"embedding": np.zeros(2)}})
