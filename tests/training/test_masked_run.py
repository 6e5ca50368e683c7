"""Masked language models through the whole trainer: every kind of rows, and what does not fit is one line."""

import dataclasses

import numpy as np
import pytest
from tiny_models import BERT

from llm_jax.decoding.fill_mask import fill, pseudo_logprobs
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import NATS_PER_TOKEN
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training import metrics, run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizers import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = {**BERT, "vocab_size": 120, "context_length": 24, "model_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}


def config_of(corpus, model, data, objective, steps=30):
    return run.RunConfig(
        model=model,
        data=run.DataConfig(str(corpus), tokenizer_kind="wordpiece", validation_share=0.2, **data),
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        plan=PlanConfig(),
        training=LoopConfig(steps, 16, 24, log_every=1, checkpoint_every=steps, eval_every=steps),
    )


def test_pairs_with_static_masks(corpus, tmp_path):
    config = config_of(corpus, BertConfig(**SIZES), {"pairs": "next", "mask_copies": 2}, MaskedLM())
    trained = run.train(config, tmp_path)
    rows = [r for r in read_metrics(tmp_path) if "train/loss" in r]
    tokens = [r["train/masked_token"] for r in rows]
    assert tokens[0] == pytest.approx(np.log(120), rel=0.1) and np.mean(tokens[-5:]) < tokens[0] - 0.5
    assert rows[0]["train/pair"] == pytest.approx(np.log(2), rel=0.1)
    got = trained.evaluation
    assert got["eval/loss"] == pytest.approx(got["eval/masked_token"] + got["eval/pair"])
    assert {"eval/accuracy", "eval/pair_accuracy"} <= got.keys() and 2 < got["eval/baseline_loss"] < np.log(120) + 1
    assert "eval/bits_per_byte" not in trained.evaluation
    assert run.load_config(tmp_path) == config

    ids = trained.tokenizer.batch(["the quick brown fox"])["input_ids"]
    logp = fill(trained.model, trained.state.params, ids, np.ones_like(ids))
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1, rtol=1e-4)
    mask = trained.tokenizer.role("mask")
    each = pseudo_logprobs(trained.model, trained.state.params, ids[0], np.arange(1, ids.shape[1] - 1), mask)
    hidden = ids.copy()
    hidden[0, 2] = mask
    alone = fill(trained.model, trained.state.params, hidden, np.ones_like(ids))[0, 2, ids[0, 2]]
    assert each[1] == pytest.approx(alone, rel=1e-4)


def test_full_sentences_with_dynamic_span_masks(corpus, tmp_path, monkeypatch):
    units = []
    monkeypatch.setattr(metrics, "plot_loss", lambda _, unit: units.append(unit))
    model = BertConfig(**SIZES, num_token_types=1, position_offset=2, head="masked_lm", pooler=None)
    trained = run.train(config_of(corpus, model, {}, MaskedLM(unit="spans", pair=0.0), steps=3), tmp_path)
    assert units == [NATS_PER_TOKEN]  # what is masked at once is not a unit of the loss
    assert np.isfinite(trained.evaluation["eval/loss"]) and "eval/pair" not in trained.evaluation


@pytest.mark.parametrize(
    "model, objective, words",
    [
        (BertConfig(**SIZES), CausalLM(), "is not causal: train it with objective MaskedLM"),
        (GPTConfig(120, 24, 24, 2, 2), MaskedLM(), "needs an encoder with model.head="),
        (BertConfig(**SIZES, head="tokens"), MaskedLM(), "needs an encoder with model.head="),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(model, objective, words, corpus, tmp_path):
    with pytest.raises(ValueError, match=words):
        run.train(config_of("nowhere", model, {}, objective), tmp_path)


@pytest.mark.parametrize(
    "data, model, objective, words",
    [
        ({"pairs": "next"}, {"num_token_types": 1, "position_offset": 2}, MaskedLM(), "needs model.num_token_types=2"),
        ({"pairs": "order"}, {"head": "masked_lm"}, MaskedLM(), "and model.head='pretraining'"),
        ({"segments": True}, {}, MaskedLM(), "leave data.packing and data.segments"),
    ],
)
def test_data_that_does_not_fit(data, model, objective, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run.train(config_of("nowhere", BertConfig(**SIZES, **model), data, objective), tmp_path)


def test_pairs_are_of_masked_models(tmp_path):
    with pytest.raises(ValueError, match="data.pairs and data.mask_copies are of masked models"):
        run.train(config_of("nowhere", GPTConfig(120, 24, 24, 2, 2), {"mask_copies": 2}, CausalLM()), tmp_path)


def test_a_wrong_masked_objective_names_its_own_field():
    values = run.RunConfig(model=BertConfig(**SIZES), objective=MaskedLM()).to_dict()
    values["objective"]["rate"] = 1.5
    with pytest.raises(ValueError, match="rate=1.5 must lie in"):
        run.RunConfig.from_dict(values)


def test_a_held_out_part_too_small_for_pairs_is_not_evaluated(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choice(["the", "cat", "sat"], 60)))
    config = config_of(tmp_path / "*.txt", BertConfig(**SIZES), {"pairs": "next"}, MaskedLM(), steps=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_share=0.02))
    assert run.train(config, tmp_path / "run").evaluation == {}


def test_data_fields_are_checked():
    with pytest.raises(ValueError, match="pairs='both' is not one of none, next, order"):
        run.DataConfig(pairs="both")
    with pytest.raises(ValueError, match="mask_copies=-1 must not be negative"):
        dataclasses.replace(run.DataConfig(), mask_copies=-1)
