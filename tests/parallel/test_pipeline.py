"""Every schedule equals accumulation over the same micro-batches on one device: parameters, moments, losses, norms."""

import jax
import numpy as np
import pytest
from plan_runs import one_device, start, two_steps

from llm_jax.nn import paths
from llm_jax.parallel import hlo, pipeline, schedules
from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.plan import Plan, PlanConfig

ROWS = {  # name: (plan, model); 5 layers are no multiple of 2 or 4, dropout is on in `deep`
    "gpipe, 5 layers in 2": (PlanConfig(data=4, pipe=2, schedule="gpipe"), "deep"),
    "1f1b, 5 layers in 4, zero 1": (PlanConfig(data=2, pipe=4, schedule="1f1b", zero=1), "deep"),
    "interleaved, tied": (PlanConfig(data=4, pipe=2, schedule="interleaved", chunks=2, microbatches=2), "deep_tied"),
    "albert, shared layers, zero 2": (PlanConfig(data=4, pipe=2, schedule="1f1b", zero=2), "albert"),
    "bert, padded rows": (PlanConfig(replica=2, data=2, pipe=2, schedule="zero_bubble", microbatches=2), "bert"),
    "xlnet, two streams": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe"), "xlnet_alone"),
    "t5, two pipelines, zero 3": (PlanConfig(data=4, pipe=2, schedule="gpipe", zero=3), "t5"),
    "transformer, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe", microbatches=2), "transformer"),
    "zero bubble, zero 3, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="zero_bubble", zero=3), "deep_tied"),
}


@pytest.mark.parametrize("row", ROWS)
def test_equals_accumulation(row):
    config, name = ROWS[row]
    want, want_metrics = one_device(name, config.make_schedule().micros)
    state, metrics = two_steps(config, name, 1)
    got = jax.device_get(state.replace(key=None))
    before = dict(paths.flatten(start(name).params))
    for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)
        if path.startswith("params/") and not path.endswith("key/bias"):
            assert not np.array_equal(b, before[path.removeprefix("params/")]), path
    for a, b in zip(metrics, want_metrics, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "name, p, m, v", [("gpipe", 4, 8, 1), ("1f1b", 4, 8, 1), ("interleaved", 4, 8, 2), ("zero_bubble", 4, 8, 1)]
)
def test_places_of_inputs(name, p, m, v):
    """GPipe holds every micro-batch, the others no more than the pipeline is deep, one more with chunks."""
    s = schedules.make(name, p, m, v)
    held, back, split = pipeline.slots(s, pipeline.tables(s))
    assert held == {"gpipe": m, "1f1b": p, "interleaved": held, "zero_bubble": p}[name]
    assert back <= held <= m and split == (p if s.splits else 1)


def toy(name, p=4, m=8):
    """A compiled schedule of wide layers, `tanh(x w)`, and a square loss."""
    s = schedules.make(name, p, m, 2 if name == "interleaved" else 1)
    mesh = make_mesh({"data": 8 // p, "pipe": p})
    w, x = np.ones((8, 16, 16), np.float32), np.ones((m, 64, 16), np.float32)
    layer = lambda w, i, x, context: jax.numpy.tanh(x @ w) + 0 * i
    finish = lambda outer, x, micro: ((x**2).sum() * outer, {"square": (x**2).sum()})
    cut = pipeline.Cut(8, p * s.chunks)
    run = jax.jit(
        lambda w, x: pipeline.run(s, mesh, cut, layer, finish, w, np.float32(1), x, np.zeros((m, 1)), np.arange(m))
    )
    return run.lower(w, x).compile()


def test_1f1b_holds_fewer_activations_than_gpipe():
    """Inputs of 4 micro-batches in the place of 8, 4 KiB each."""
    gpipe, one = (toy(name).memory_analysis().temp_size_in_bytes for name in ("gpipe", "1f1b"))
    assert gpipe - one == 4 * 64 * 16 * 4


def test_neighbours_exchange_once_a_tick():
    """One permutation each way a tick, of a micro-batch's activations, and nothing else along `pipe` in the loop."""
    s = schedules.make("1f1b", 4, 8)
    found = hlo.collectives(toy("1f1b").as_text())
    sent = [c for c in found if c.kind == "collective-permute" and c.times == len(s.ticks)]
    assert sum(c.size * c.times for c in sent) == 2 * len(s.ticks) * 64 * 16 * 4
    assert all(c.times == 1 for c in found if c not in sent)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        (
            "t5",
            {"schedule": "1f1b"},
            "schedule=1f1b needs one stack of layers, the model has 2 .*set plan.schedule=gpipe",
        ),
        ("xlnet", {}, "what runs on from batch to batch .* has no place in a pipeline"),
    ],
)
def test_models_that_do_not_fit(name, changes, words):
    with pytest.raises(ValueError, match=words):
        two_steps(PlanConfig(data=4, pipe=2, **changes), name, 1)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"pipe": 4, "microbatches": 2}, "plan.microbatches=2 leave stages of plan.pipe=4 idle: take 4 or more"),
        ({"pipe": 2, "unroll": True}, "plan.pipe and plan.unroll exclude each other"),
        ({"microbatches": 4}, "are of a pipeline: set plan.pipe"),
        ({"pipe": 2, "chunks": 2}, "schedule=1f1b with chunks=2"),
        ({"pipe": 2, "schedule": "pipedream"}, "schedule='pipedream' is none of gpipe, 1f1b, interleaved, zero_bubble"),
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
    with pytest.raises(pipeline.PipelineError, match="layers that differ cannot be stages; stack them"):
        pipeline.stacks({"decoder": {"layers": {"0": {}, "1": {}}}})
    with pytest.raises(pipeline.PipelineError, match="the model has no stack of layers"):
        pipeline.stacks({"embed": {"embedding": np.zeros(2)}})
