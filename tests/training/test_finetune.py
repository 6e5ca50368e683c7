"""LoRA over an int8 base on chats: only A and B move, and a second call goes on where the first ended."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import MODELS, model_params

from llm_jax.compress.quantize import Quantized
from llm_jax.data import tokenizers
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.interop import Pretrained
from llm_jax.nn import paths, weights
from llm_jax.parallel.plan import PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import finetune
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run import DataConfig, RunConfig

ROWS = [
    {"prompt": f"say {a} {b}", "completion": f"{a} {b} " * 4} for a in ("red", "blue") for b in ("sky", "sea", "one")
]


def config_of(source, steps, **fields):
    run = RunConfig(
        data=DataConfig(str(source), validation_share=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-1, schedule="constant"),
        plan=PlanConfig(zero=3),
        training=LoopConfig(steps, 8, 24, log_every=1, checkpoint_every=100),
    )
    return FinetuneConfig(
        run, **{"lora": LoraConfig(("out/kernel",), rank=4, dropout=0.1), "base": "int8", "format": "chat", **fields}
    )


@pytest.fixture(scope="module")
def loaded():
    config = dataclasses.replace(MODELS["llama"], vocab_size=300, context_length=32, hidden_dim=16, model_dim=24)
    tokenizer = tokenizers.train((" ".join(r.values()) for r in ROWS), "bpe", 300)
    return Pretrained(config.make(), model_params(config, std=0.1), tokenizer, config)


def test_finetuning_and_going_on(loaded, tmp_path):
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in ROWS * 4))
    key, folder = jax.random.key(1), tmp_path / "run"
    first = finetune.run(loaded, config_of(source, 10), folder, key)
    second = finetune.run(loaded, config_of(source, 40), folder, key)

    rows = read_metrics(folder)
    losses = [r["train/loss"] for r in rows if "train/loss" in r]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 41))
    assert np.mean(losses[-2:]) < losses[0] - 0.6  # all that one matrix over a random base can do

    start = finetune.adapt(loaded.params, config_of(source, 10), key)
    moved = set()
    state = second.trained.state
    for (path, a), b in zip(paths.flatten(state.params), jax.tree.leaves(start), strict=True):
        if not np.array_equal(a, b):
            moved.add(path.rpartition("/")[2])
    assert moved == {"a", "b"}
    out = state.params["decoder"]["layers"]["attention"]["out"]["kernel"]
    assert isinstance(out, Lora) and isinstance(out.base, Quantized) and out.dropout == 0.1
    assert not np.array_equal(out.b, first.trained.state.params["decoder"]["layers"]["attention"]["out"]["kernel"].b)

    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    logits = jax.jit(lambda p: loaded.model.apply({"params": p}, ids).logits)
    np.testing.assert_allclose(logits(second.merged), logits(state.params), rtol=1e-4, atol=1e-4)
    assert not any(map(weights.is_node, jax.tree.leaves(second.merged, is_leaf=weights.is_node)))

    stored, _ = Checkpoints(folder / "checkpoints", read_only=True).restore_params()
    assert jax.tree.structure(stored) == jax.tree.structure(state.params)  # types, scales and dropout rates too
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, state.params))

    trained = sum(x.size for p, x in paths.flatten(state.params) if p.endswith(("/a", "/b")))
    assert second.bytes["trainable"] == 4 * trained and second.bytes["optimizer state"] < 8 * trained + 64
    assert f"trainable {4 * trained:,} bytes" in second.describe()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"base": "int4"}, "base='int4' is neither float nor int8"),
        ({"format": "csv"}, "format='csv' is neither text nor chat"),
        ({"lora": None}, "a quantized base cannot train whole; give it LoRA"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        config_of("x", 1, **fields)


def test_a_model_without_tokenizer_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        finetune.run(loaded._replace(tokenizer=None), config_of("x", 1), tmp_path, jax.random.key(0))


@pytest.mark.parametrize("lora", [LoraConfig(rank=3), None])
def test_config_round_trip(lora):
    config = config_of("x", 3, lora=lora, base="float")
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name, possible", [("llama", True), ("gpt2", False)])
def test_who_can_be_exported(name, possible):
    assert finetune.can_export(MODELS[name]) is possible
