"""Masked language modelling: targets, static and dynamic masks, pairs, accumulation."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny_models import ENCODERS, model_params

from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import total_loss
from llm_jax.training.precision import Precision
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

CONFIG = ENCODERS["bert"]
V, T, ROWS = CONFIG.vocab_size, 12, 4
RNG = np.random.default_rng(0)
LENGTHS = np.array([12, 9, 12, 5])
REAL = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)
MASKABLE = REAL.astype(bool) & (np.arange(T) > 0)
BATCH = {
    "input_ids": np.where(REAL, RNG.integers(5, V, (ROWS, T)), 1).astype(np.int32),
    "attention_mask": REAL,
    "maskable": MASKABLE,
    "token_type_ids": (np.arange(T) > 6).astype(np.int32) * REAL,
    "pair_labels": np.array([0, 1, 1, 0], np.int32),
    "mask_seed": np.arange(ROWS, dtype=np.int32),
}
OBJECTIVE = MaskedLM(mask_id=3, vocab_size=V)


def without(*names):
    return {k: v for k, v in BATCH.items() if k not in names}


prepare = jax.jit(lambda batch, key, objective=OBJECTIVE: objective.prepare(batch, key), static_argnums=2)


def test_targets_are_what_stood_there():
    prepared = prepare(BATCH, jax.random.key(0))
    t = jax.device_get(prepared.targets)
    used = t.weights_BK > 0
    want = np.maximum(1, np.floor(MASKABLE.sum(1) * 0.15 + 0.5))
    np.testing.assert_array_equal(used.sum(1), want)
    np.testing.assert_array_equal(t.labels_BK, np.take_along_axis(BATCH["input_ids"], t.positions_BK, 1))
    assert np.take_along_axis(MASKABLE, t.positions_BK, 1)[used].all()
    assert float(prepared.weights["masked_token"]) == want.sum() and float(prepared.weights["pair"]) == ROWS
    changed = np.asarray(prepared.inputs["input_ids"]) != BATCH["input_ids"]
    places = np.zeros((ROWS, T), bool)
    for row in range(ROWS):
        places[row, t.positions_BK[row][used[row]]] = True
    assert not (changed & ~places).any() and changed.any()


def test_static_masks_depend_on_the_row_dynamic_ones_on_the_key():
    ids = lambda batch, seed: np.asarray(prepare(batch, jax.random.key(seed)).inputs["input_ids"])
    np.testing.assert_array_equal(ids(BATCH, 0), ids(BATCH, 1))
    moved = {k: v[::-1] for k, v in BATCH.items()}
    np.testing.assert_array_equal(ids(moved, 0)[::-1], ids(BATCH, 0))
    dynamic = without("mask_seed")
    np.testing.assert_array_equal(ids(dynamic, 0), ids(dynamic, 0))
    assert (ids(dynamic, 0) != ids(dynamic, 1)).any()


def test_loss_and_pairs_by_hand():
    model, params = CONFIG.make(), model_params(CONFIG)

    @jax.jit
    def run(params):
        prepared = OBJECTIVE.prepare(BATCH, jax.random.key(0))
        out = model.apply({"params": params}, **prepared.inputs)
        scores = OBJECTIVE.score(out, prepared.targets)
        return prepared.targets, out.logits, out.pair_logits, scores, total_loss(OBJECTIVE, scores, prepared.weights)

    t, logits, pair, scores, loss = jax.device_get(run(params))
    logp = lambda x: x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
    rows = np.arange(ROWS)
    token = -logp(np.float64(logits))[rows[:, None], t.positions_BK, t.labels_BK]
    second = -logp(np.float64(pair))[rows, BATCH["pair_labels"]]
    assert scores["masked_token"] == pytest.approx((token * t.weights_BK).sum(), rel=1e-5)
    assert scores["pair"] == pytest.approx(second.sum(), rel=1e-5)
    mean = (token * t.weights_BK).sum() / t.weights_BK.sum() + second.mean()
    assert loss == pytest.approx(mean, rel=1e-5)
    assert scores["pair_accuracy"] == (pair.argmax(-1) == BATCH["pair_labels"]).sum()


def test_accumulation_gives_the_gradient_of_one_batch():
    """Rows hold unlike numbers of masked tokens, and there are two terms with two weights."""
    config = dataclasses.replace(CONFIG, dropout=0.0, attention_dropout=0.0)
    tx = optax.sgd(1.0)

    def after(accumulation):
        state = init_state(model_params(config), tx, jax.random.key(0), Precision(), None, ema=False)
        step = make_train_step(config.make(), OBJECTIVE, tx, StepConfig(accumulation, clip_norm=0.0))
        state, metrics = jax.jit(step)(state, BATCH)
        return paths.flatten(jax.device_get(state.params)), jax.device_get(metrics)

    (one, a), (two, b) = after(1), after(2)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for (path, x), (_, y) in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=path)


def test_rows_of_weight_zero_do_not_count():
    weights = np.ones((ROWS, T), np.float32)
    weights[2] = 0
    prepared = prepare({**BATCH, "loss_weights": weights}, jax.random.key(0))
    assert (np.asarray(prepared.targets.weights_BK)[2] == 0).all()
    assert float(prepared.weights["pair"]) == ROWS - 1


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"unit": "letters"}, "unit='letters' is not one of tokens, words, spans"),
        ({"rate": 0.0}, "rate=0.0 must lie in"),
        ({"mask": 0.8, "random": 0.3}, "must be shares of one whole"),
        ({"longest": 0}, "longest=0 must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must lie in"),
    ],
)
def test_refused_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        MaskedLM(**fields)


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="needs mask_id and vocab_size"):
        MaskedLM().prepare(BATCH, jax.random.key(0))
    with pytest.raises(ValueError, match="needs `words` in the batch"):
        dataclasses.replace(OBJECTIVE, unit="words").prepare(BATCH, jax.random.key(0))
    with pytest.raises(ValueError, match="needs an encoder with model.head="):
        MaskedLM().for_run(1, GPTConfig(), 3)
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        MaskedLM().for_run(1, CONFIG, None)
    filled = MaskedLM().for_run(1, CONFIG, 7)
    assert (filled.mask_id, filled.vocab_size) == (7, V)
