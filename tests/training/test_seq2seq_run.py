"""Runs of encoder-decoders from a config: a copy task reaches exactness, spans and prefixes train, pairs resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from devices import one_device

from llm_jax import config as configs
from llm_jax import interop
from llm_jax.decoding.generate import Generator
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training import run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = dict(context_length=32, model_dim=32, num_layers=1, num_heads=2, dropout=0.0)


def config_of(corpus, model, objective, steps=4, **data):
    return run.RunConfig(
        model=model,
        data=run.DataConfig(str(corpus), validation_share=0.2, **data),
        objective=objective,
        optimizer=OptimizerConfig("adam", 5e-3, warmup_steps=20, weight_decay=0.0),
        training=LoopConfig(steps, 16, 12, log_every=10, checkpoint_every=200, seed=1),
    )


def test_a_copy_task_reaches_exactness(tmp_path):
    """Characters: the decoder must find each in the source by its place."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), rng.integers(3, 9))) for _ in range(600)]
    rows = [json.dumps({"from": w, "to": w}) for w in dict.fromkeys(words)]
    (tmp_path / "copy.jsonl").write_text("\n".join(rows))
    model = TransformerConfig(**SIZES, vocab_size=8, hidden_dim=64, norm="pre")
    config = config_of(*(tmp_path / "copy.jsonl", model, Seq2Seq(), 360), fields=("from", "to"), tokenizer_kind="char")
    with one_device():
        trained = run.train(config, tmp_path / "run")
    assert trained.evaluation["eval/loss"] < 0.05 < 1.5 < trained.evaluation["eval/baseline_loss"]
    new = ["".join(rng.choice(list("abcdef"), n)) for n in (3, 5, 8, 8)]
    tokenizer = trained.tokenizer
    generator = Generator(trained.model, trained.state.params, tokenizer.eos_ids)
    done = generator.generate([tokenizer.encode_source(w) for w in new], 12, jax.random.key(0))
    assert [tokenizer.decode(d.tokens) for d in done] == new
    assert {d.finish_reason for d in done} == {"stop"}
    loaded = interop.load(tmp_path / "run")  # the work directory is a model
    assert loaded.config == model


@pytest.mark.parametrize("task", ["spans", "prefix"])
def test_text_made_into_pairs(task, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"{w}{i}" for w in ("the", "cat", "sat", "on", "a", "mat")) * 4)
    model = T5Config(**SIZES, vocab_size=480, hidden_dim=64, head_dim=16)
    config = config_of(tmp_path, model, Seq2Seq(task=task, end_id=0 if task == "spans" else None))
    trained = run.train(config, tmp_path / "run")
    assert np.isfinite(trained.evaluation["eval/loss"]) and trained.evaluation["eval/baseline_loss"] > 1
    if task == "spans":
        assert trained.tokenizer.token(479) == "<extra_id_0>" and trained.tokenizer.token(380) == "<extra_id_99>"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data=run.DataConfig("x")), r"data.fields and objective Seq2Seq\(task='pairs'\) need each other"),
        (dict(objective=Seq2Seq(task="spans")), r"data.fields and objective Seq2Seq\(task='pairs'\) need each other"),
        (dict(data=run.DataConfig("x", fields=("en",))), r"data.fields=\('en',\) must name a source and a target"),
        (dict(data=run.DataConfig("x", fields=("a", "b"), packing="whole")), "leave data.packing and data.segments"),
        (dict(data=run.DataConfig("x", fields=("a", "b"), split="tail")), "pairs are held out whole"),
        (dict(model=GPTConfig()), "objective Seq2Seq needs an encoder-decoder, not GPTConfig"),
        (dict(objective=CausalLM()), "is not causal: train it with objective Seq2Seq"),
    ],
)
def test_what_does_not_fit_together_is_said_at_once(changes, words, tmp_path):
    model = TransformerConfig(**SIZES, vocab_size=300, hidden_dim=64)
    config = dataclasses.replace(config_of("x", model, Seq2Seq(), fields=("a", "b")), **changes)
    with pytest.raises((configs.ConfigError, ValueError), match=words):
        run.train(config, tmp_path / "run")
