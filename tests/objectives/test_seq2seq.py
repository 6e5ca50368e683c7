"""A target given a source: shifting, weights, smoothing, and the same gradient from any micro-batches."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, MODELS, V, model_params

from llm_jax.objectives.objective import total_loss
from llm_jax.objectives.seq2seq import Seq2Seq

CONFIG = ENCODER_DECODERS["t5"]
RNG = np.random.default_rng(0)
IDS, LABELS = RNG.integers(0, V, (4, 6)), RNG.integers(1, V, (4, 5))
LABELS[1, 3:] = -100
BATCH = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "labels": LABELS}
KEY = jax.random.key(0)
prepare = jax.jit(lambda batch, key, objective: objective.prepare(batch, key), static_argnums=2)


def test_the_decoder_reads_the_labels_one_later():
    prepared = prepare(BATCH, KEY, Seq2Seq().for_run(8, CONFIG, None))
    decoder = np.asarray(prepared.inputs["decoder_input_ids"])
    assert (decoder[:, 0] == 0).all() and (decoder[0, 1:] == LABELS[0, :-1]).all()
    assert (decoder >= 0).all()  # what does not count is an entry all the same
    assert prepared.weights["next_token"] == 18 == prepared.weights["accuracy"]
    objective = Seq2Seq(start_id=0)
    counted = prepare({**BATCH, "loss_weights": np.eye(4)[:, :2] + np.eye(4)[:, 2:]}, KEY, objective)
    assert counted.weights["next_token"] == 18
    none = prepare({**BATCH, "loss_weights": np.zeros((4, 2))}, KEY, objective)
    assert none.weights["next_token"] == 0
    assert prepared.weights["tokens"] == BATCH["attention_mask"].sum() + (LABELS >= 0).sum()  # of both sides


def test_loss_in_closed_form():
    params, model = model_params(CONFIG), CONFIG.make()
    rates = (0.0, 0.1)

    @jax.jit
    def run(params):
        objectives = [Seq2Seq(label_smoothing=rate).for_run(8, CONFIG, None) for rate in rates]
        prepared = objectives[0].prepare(BATCH, KEY)
        out = model.apply({"params": params}, **prepared.inputs)
        return out.logits, [total_loss(o, o.score(out, prepared.targets), prepared.weights) for o in objectives]

    logits, losses = run(params)
    logp = np.asarray(jax.nn.log_softmax(logits))
    label_logp = np.take_along_axis(logp, np.maximum(LABELS, 0)[..., None], 2)[..., 0]
    for smoothing, loss in zip(rates, losses, strict=True):
        each = -(1 - smoothing) * label_logp - smoothing * logp.mean(-1)
        np.testing.assert_allclose(loss, each[LABELS >= 0].mean(), rtol=1e-5)


def test_micro_batches_give_the_gradient_of_one_batch():
    """Rows of unlike weight."""
    model, params = CONFIG.make(), model_params(CONFIG)
    objective = Seq2Seq().for_run(8, CONFIG, None)

    def loss(params, rows, totals):
        prepared = objective.prepare({k: jax.numpy.asarray(v)[rows] for k, v in BATCH.items()}, KEY)
        out = model.apply({"params": params}, **prepared.inputs)
        return total_loss(objective, objective.score(out, prepared.targets), totals)

    totals = objective.prepare(BATCH, KEY).weights
    grad = jax.jit(jax.grad(loss))
    whole = grad(params, np.arange(4), totals)
    parts = jax.tree.map(np.add, grad(params, np.array([0, 1]), totals), grad(params, np.array([2, 3]), totals))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, parts)


def test_tasks_on_text():
    ids = RNG.integers(1, 20, (3, 40))
    for task, length in (("spans", 37), ("prefix", 40)):
        objective = Seq2Seq(task=task, end_id=1).for_run(1, CONFIG, None)
        prepared = jax.device_get(prepare({"input_ids": ids}, KEY, objective))
        assert prepared.inputs["input_ids"].shape == (3, length) and objective.chunks == 4
        again = jax.device_get(prepare({"input_ids": ids}, KEY, objective))
        np.testing.assert_array_equal(again.inputs["input_ids"], prepared.inputs["input_ids"])
        other = jax.device_get(prepare({"input_ids": ids}, jax.random.key(1), objective))
        assert any(not np.array_equal(other.inputs[k], prepared.inputs[k]) for k in prepared.inputs)
    with pytest.raises(ValueError, match="task='prefix' takes full rows of text"):
        Seq2Seq(task="prefix", start_id=0).prepare(BATCH, KEY)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Seq2Seq(task="mask"), "task='mask' is not one of pairs, spans, prefix"),
        (lambda: Seq2Seq(noise_density=1.0), r"noise_density=1.0 must lie in \(0, 1\)"),
        (lambda: Seq2Seq(mean_span=0.5), "mean_span=0.5 be at least 1"),
        (lambda: Seq2Seq(label_smoothing=1.0), "label_smoothing=1.0 must lie in"),
        (lambda: Seq2Seq(z_loss=-1.0), "must not be negative"),
        (lambda: Seq2Seq().prepare(BATCH, KEY), "Seq2Seq needs start_id"),
        (lambda: Seq2Seq().for_run(1, MODELS["gpt2"], None), "needs an encoder-decoder, not GPTConfig"),
        (lambda: Seq2Seq().for_run(1, dataclasses.replace(CONFIG, decoder=False), None), "needs an encoder-decoder"),
        (lambda: Seq2Seq().for_run(1, dataclasses.replace(CONFIG, head="span"), None), "model.head='lm', not 'span'"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
