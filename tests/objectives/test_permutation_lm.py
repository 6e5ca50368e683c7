"""Permutation LM: rates, orders, reproducibility, the loss by hand, accumulation with memories."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import MODELS, model_params

from llm_jax.models.xlnet import XLNetConfig
from llm_jax.objectives.objective import total_loss
from llm_jax.objectives.permutation_lm import PermutationLM, hidden, order
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

V, T = 31, 24
CONFIG = XLNetConfig(vocab_size=V, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10, dropout=0.0)
IDS = np.random.default_rng(0).integers(0, V, (200, T))
KEY = jax.random.key(0)
prepare = jax.jit(lambda batch, key, objective: objective.prepare(batch, key), static_argnums=2)


@pytest.mark.parametrize("unit", ["tokens", "spans"])
def test_a_sixth_is_predicted_in_every_order(unit):
    mask = np.ones_like(IDS)
    mask[:, :4] = 0  # padding on the left
    objective = PermutationLM(unit=unit)
    prepared = prepare({"input_ids": IDS, "attention_mask": mask}, KEY, objective)
    labels, weights = (np.asarray(x) for x in prepared.targets)
    places = np.asarray(prepared.inputs["target_positions"])
    chosen = weights > 0
    assert (places[chosen] >= 4).all()
    if unit == "tokens":
        assert (chosen.sum(1) == 3).all()  # round(20 / 6)
    assert abs(chosen.sum() / mask.sum() - 1 / 6) < 0.04
    assert (labels == np.take_along_axis(IDS, places, 1)).all()
    assert prepared.weights["permuted_token"] == chosen.sum() and prepared.weights["tokens"] == mask.sum()
    perm = np.asarray(prepared.inputs["perm_mask"])
    for row in range(20):
        own = places[row][chosen[row]]
        context = np.setdiff1d(np.arange(T), own)
        assert not perm[row][:, context].any()  # the context is seen by all
        assert perm[row][np.ix_(context, own)].all()  # and sees no target
        block = perm[row][np.ix_(own, own)]
        assert sorted(block.sum(1).tolist()) == list(range(1, len(own) + 1)) and block.diagonal().all()
    again = prepare({"input_ids": IDS, "attention_mask": mask}, KEY, objective)
    np.testing.assert_array_equal(again.inputs["perm_mask"], perm)


def test_orders_are_uniform():
    chosen = jnp.arange(6) % 2 == 1
    ranks = np.asarray(jax.jit(jax.vmap(lambda k: order(k, chosen)))(jax.random.split(KEY, 600)))
    assert (ranks[:, ::2] == -1).all()
    counts = np.unique(ranks[:, 1::2], axis=0, return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 100) ** 2 / 100).sum() < 5 + 4 * np.sqrt(10)
    assert np.asarray(hidden(jnp.array([-1, 1, 0]))).tolist() == [
        [False, True, True],
        [False, True, False],
        [False, True, True],
    ]


def test_the_loss_by_hand():
    params, objective = model_params(CONFIG), PermutationLM()

    @jax.jit
    def run(params):
        prepared = objective.prepare({"input_ids": IDS[:4]}, KEY)
        out = CONFIG.make().apply({"params": params}, **prepared.inputs)
        loss = total_loss(objective, objective.score(out, prepared.targets), prepared.weights)
        nothing = objective.prepare({"input_ids": IDS[:4], "loss_weights": np.zeros((4, T))}, KEY)
        return out.logits, prepared.targets, loss, nothing.weights

    logits, (labels, weights), loss, nothing = run(params)
    own = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(labels)[..., None], 2)[..., 0]
    np.testing.assert_allclose(loss, -(own * weights).sum() / weights.sum(), rtol=1e-5)
    assert nothing["permuted_token"] == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_memories_run_on(accumulation):
    """The carry after two batches is what the content stream leaves, row by row, whatever the micro-batches."""
    config = dataclasses.replace(CONFIG, memory_length=10, head="lm")
    objective = PermutationLM(carry=True).for_run(1, config, None)
    params, tx = model_params(config), optax.sgd(0.0)
    step = jax.jit(make_train_step(config.make(), objective, tx, StepConfig(accumulation=accumulation)))
    state = init_state(params, tx, KEY, carry=config.init_carry(4))
    batches = [{"input_ids": IDS[i : i + 4], "continues": np.full(4, i > 0)} for i in (0, 4)]
    state, _ = step(state, batches[0])
    assert state.carry.length_B.tolist() == [10] * 4
    embedded = params["embed"]["embedding"][IDS[:4, -10:]]
    np.testing.assert_allclose(state.carry.layers[0], embedded, rtol=1e-6)
    state, metrics = step(state, batches[1])
    np.testing.assert_allclose(state.carry.layers[0], params["embed"]["embedding"][IDS[4:8, -10:]], rtol=1e-6)
    assert np.isfinite(metrics["loss"])
    state, _ = step(state, {**batches[1], "continues": np.zeros(4, bool)})
    assert state.carry.length_B.tolist() == [10] * 4


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PermutationLM(unit="words"), "unit='words' is not one of tokens, spans"),
        (lambda: PermutationLM(rate=0.0), r"rate=0.0 must lie in \(0, 1\)"),
        (lambda: PermutationLM().for_run(1, MODELS["gpt2"], None), "needs an XLNetConfig with head='lm'"),
        (lambda: PermutationLM(carry=True).for_run(1, CONFIG, None), "objective.carry needs model.memory_length"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
