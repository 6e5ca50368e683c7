"""Runs with shared parameters: as if gradients were summed by hand, resumed bitwise, whole when they are loaded."""

import shutil

import jax
import numpy as np
import optax
import pytest
from plan_runs import MODELS_HERE, OPTIMIZER, STEPS, TIES, TX, first_params, one_device, program, task

from llm_jax import interop
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths
from llm_jax.objectives.objective import total_loss
from llm_jax.parallel.plan import PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig


def test_it_is_a_run_whose_gradients_are_summed_by_hand():
    """`tests/parallel/test_plan.py` holds ZeRO-3 to the same numbers."""
    config = MODELS_HERE["shared"]
    objective, batches = task("shared")
    objective, module = objective.for_run(1, config, 3), config.make()

    def attention(tree):
        return tree["decoder"]["layers"]["attention"]

    def put_keys(tree, keys):
        layers = tree["decoder"]["layers"]
        rest = {k: v for k, v in attention(tree).items() if k != "key"}
        attend = rest if keys is None else {**rest, "key": keys}
        return {**tree, "decoder": {**tree["decoder"], "layers": {**layers, "attention": attend}}}

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            prepared = objective.prepare(batch, jax.random.key(0))
            out = module.apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        value, grads = jax.value_and_grad(loss)(put_keys(params, attention(params)["query"]))
        both = jax.tree.map(lambda a, b: a + b, attention(grads)["query"], attention(grads)["key"])
        grads = put_keys(grads, None)
        attention(grads)["query"] = both
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g * jax.numpy.minimum(1.0, OPTIMIZER.clip_norm / norm), grads)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = put_keys(first_params("shared"), None)
    state, losses = TX.init(params), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    got, metrics = one_device("shared")
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    assert len(losses) == STEPS and "key" not in attention(got.params)
    for (path, a), (_, b) in zip(paths.flatten(got.params), paths.flatten(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)


def test_it_resumes_and_is_whole_again_when_loaded(corpus, tmp_path):
    """With a moving average, which is what the run hands on."""
    key, query = "decoder/layers/attention/key", "decoder/layers/attention/query"
    config = run.RunConfig(
        model=GPTConfig(300, 16, 16, 2, 2),
        data=run.DataConfig(str(corpus), validation_share=0.2),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        plan=PlanConfig(zero=3),
        training=LoopConfig(4, 16, 16, checkpoint_every=2, ema=0.5),
        ties=(f"{key}={query}",),
    )
    trained = run.train(config, tmp_path / "run")
    stored = [p for p, _ in paths.flatten(trained.state.replace(key=None))]
    assert not any("attention/key" in p for p in stored) and f"average/{query}/kernel" in stored
    files = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert not any("attention/key" in p for p in files.stored_shapes(4))
    assert run.load_config(tmp_path / "run") == config

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    again = run.train(config, tmp_path / "again", restore_step=2)
    for (path, a), (_, b) in zip(*(paths.flatten(t.state.replace(key=None)) for t in (again, trained)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert again.evaluation == trained.evaluation

    loaded = interop.load(tmp_path / "run")
    attention = loaded.params["decoder"]["layers"]["attention"]
    np.testing.assert_array_equal(attention["key"]["kernel"], attention["query"]["kernel"])
    for (path, a), (_, b) in zip(paths.flatten(loaded.params), paths.flatten(trained.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert np.isfinite(loaded.model.apply({"params": loaded.params}, np.zeros((1, 4), int)).logits).all()


@pytest.mark.parametrize(
    "ties, plan, words",
    [
        (("a",), {}, "ties hold 'a', which is not of the form path=owner"),
        (("embed/embedding=embed/nothing",), {}, "tie names 'embed/nothing', which is not in the parameters"),
        (("head/kernel=embed/embedding",), {}, "'head/kernel' cannot borrow 'embed/embedding': their names, types or"),
        (TIES["shared"], dict(offload=("update", "parameters"), remat="full"), "no place for shared parameters"),
    ],
)
def test_errors(ties, plan, words, monkeypatch):
    monkeypatch.setitem(TIES, "shared", ties)
    with pytest.raises(ValueError, match=words):
        program(PlanConfig(data=1, **plan), "shared", devices=jax.devices()[:1])
