"""Runs whose parameters are realized once a step: the direct gradient, every plan, files, decoding."""

import functools
import shutil

import jax
import numpy as np
import optax
import pytest
from plan_runs import MODELS_HERE, assert_equals_one_device, factored, first_params, program, run_steps, start, task
from tiny_models import model_params

from llm_jax import interop
from llm_jax.decoding.generate import Generator
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths
from llm_jax.nn.realized import realize
from llm_jax.objectives.objective import total_loss
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.precision import Precision
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig
from llm_jax.training.state import averaged, init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step
from llm_jax.training.trainable import combine, partition

NAME = "realized"
MODEL = MODELS_HERE[NAME].make()
OBJECTIVE, (BATCH, *_) = task(NAME)
TX = optax.sgd(1.0)


@functools.cache
def direct(trainable=None):
    """The gradient of the loss of `realize(params)`, by autodiff alone."""
    objective = OBJECTIVE.for_run(1, MODELS_HERE[NAME], 3)

    def loss(learn, rest):
        prepared = objective.prepare(BATCH, jax.random.key(0))
        out = MODEL.apply({"params": realize(combine(learn, rest))}, **prepared.inputs)
        return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

    return jax.device_get(jax.jit(jax.grad(loss))(*partition(first_params(NAME), trainable)))


def step_of(**fields):
    objective = OBJECTIVE.for_run(1, MODELS_HERE[NAME], 3)
    config = StepConfig(clip_norm=0.0, **fields)
    return make_train_step(MODEL, objective, TX, config), config


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("trainable", [None, ("*/u", "mlp/*")])
def test_a_step_has_the_direct_gradient(accumulation, trainable):
    step, config = step_of(accumulation=accumulation, trainable=trainable)
    state = init_state(first_params(NAME), TX, jax.random.key(0), trainable=trainable)
    after = jax.device_get(jax.jit(step)(state, BATCH)[0].params)
    found = dict(paths.flatten(direct(trainable)))
    for (path, a), b in zip(paths.flatten(first_params(NAME)), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a - b, found.get(path, 0 * a), rtol=1e-4, atol=1e-6, err_msg=path)


def test_nodes_are_realized_once_whatever_the_micro_batches():
    """The arc tangent is in the program, and in none of its loops; without nodes no program changes."""
    step, _ = step_of(accumulation=4)
    traced = jax.make_jaxpr(step)(init_state(first_params(NAME), TX, jax.random.key(0)), BATCH).jaxpr

    def in_loops(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [getattr(p, "jaxpr", p) for p in eqn.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
            yield from (str(p) for p in inner if eqn.primitive.name in ("scan", "while"))
            yield from (text for p in inner for text in in_loops(p))

    loops = list(in_loops(traced))
    assert str(traced).count(" atan ") == 2 and loops and not any(" atan " in text for text in loops)


PLANS = {
    "ZeRO-3": (PlanConfig(data=4, model=2, zero=3), 2),
    "pipeline": (PlanConfig(data=2, pipe=2, model=2, zero=2, microbatches=2), 1),
}
LATER = {  # in tests/parity/test_delta_runs.py
    "explicit ZeRO-3": (PlanConfig(data=8, zero=3, explicit=True, remat="full"), 1),
    "pipeline of ZeRO-3": (PlanConfig(data=2, pipe=4, zero=3, microbatches=4), 1),
}


@pytest.mark.parametrize("plan, accumulation", PLANS.values(), ids=PLANS)
def test_every_plan_equals_one_device(plan, accumulation):
    assert_equals_one_device(*run_steps(plan, NAME, accumulation), NAME)


@pytest.mark.parametrize("offload", ["update", "disk"])
def test_state_elsewhere_equals_one_device(offload, tmp_path):
    after = []
    for plan in (PlanConfig(data=1, offload=(offload,)), PlanConfig(data=1)):
        config = RunConfig(MODELS_HERE[NAME], OBJECTIVE, plan=plan, training=LoopConfig(16, 8, 2))
        given = jax.eval_shape(lambda: first_params(NAME))
        made = build(config, Plan(plan, config.model, jax.devices()[:1]), 3, given, scratch=tmp_path)
        state = made.init(jax.random.key(3), jax.tree.map(np.copy, first_params(NAME)))
        after.append(jax.device_get(made.step(state, BATCH)[0].params))
    for (path, a), b in zip(paths.flatten(after[0]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)


def test_parameters_on_the_host_refuse_them():
    plan = PlanConfig(data=1, offload=("update", "parameters"), remat="full")
    with pytest.raises(ValueError, match="plan.offload=parameters has no place for realized nodes"):
        program(plan, NAME, devices=jax.devices()[:1])


def test_evaluation_realizes():
    objective = OBJECTIVE.for_run(1, MODELS_HERE[NAME], 3).plain()
    evaluate = jax.jit(make_eval_step(MODEL, objective, Precision()))
    sums = [jax.device_get(evaluate(p, BATCH)) for p in (first_params(NAME), realize(first_params(NAME)))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *sums)


def test_checkpoints_and_work_directories_come_back(tmp_path):
    """A checkpoint holds the nodes, to the bit; a loaded work directory holds what they become."""
    _, made = program(PlanConfig(data=4, zero=3), NAME, devices=tuple(jax.devices()[:4]))
    state = jax.device_put(start(NAME).replace(key=jax.random.key(3)), made.shardings)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, state, {})
    checkpoints.close()
    back = Checkpoints(tmp_path / "checkpoints").restore(made.shapes, 0, made.shardings).state
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for (path, a), b in zip(paths.flatten(averaged(back)), jax.tree.leaves(first_params(NAME)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    interop.save_own(tmp_path / "run", MODEL, first_params(NAME))
    loaded, want = interop.load(tmp_path / "run").params, realize(first_params(NAME))
    for (path, a), (same, b) in zip(paths.flatten(loaded), paths.flatten(want), strict=True):
        assert path == same
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=path)


def test_a_run_resumes_and_hands_on_what_nodes_become(corpus, tmp_path):
    """With accumulation, and a moving average of the factors."""
    config = RunConfig(
        model=GPTConfig(300, 16, 16, 2, 2),
        data=run.DataConfig(str(corpus), validation_share=0.2),
        optimizer=OptimizerConfig(learning_rate=2e-2, rates=("*/u=2",), layer_decay=0.9),
        plan=PlanConfig(zero=3),
        training=LoopConfig(4, 16, 16, accumulation=2, checkpoint_every=2, ema=0.5),
    )
    train = functools.partial(run.train, config, adapt=lambda params: factored(params, "query/kernel"))
    trained = train(tmp_path / "run", model_params(config.model))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    again = train(tmp_path / "again", jax.eval_shape(lambda: model_params(config.model)), restore_step=2)
    for (path, a), (_, b) in zip(*(paths.flatten(t.state.replace(key=None)) for t in (again, trained)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    loaded = interop.load(tmp_path / "run").params
    want = realize(averaged(trained.state))
    for (path, a), b, c in zip(paths.flatten(loaded), *map(jax.tree.leaves, (trained.params, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=path)
        np.testing.assert_array_equal(b, c, err_msg=path)


def test_decoding_and_export_realize(tmp_path):
    params = first_params(NAME)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(Generator(MODEL, params).params) == shapes(Generator(MODEL, realize(params)).params)
    interop.save(tmp_path / "hf", MODEL, params)
    table = interop.load(tmp_path / "hf").params["embed"]["embedding"]
    np.testing.assert_allclose(table, realize(params)["embed"]["embedding"][: len(table)], rtol=1e-6)
    with pytest.raises(ValueError, match="no module reads spare"):
        Generator(MODEL, factored({**params, "spare": {"kernel": np.zeros((4, 4), np.float32)}}, "spare/kernel"))
