"""Fine-tuning a saved folder: the loss falls, the base stays bitwise, memory is LoRA's, exports load equal."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import noise

from llm_jax import interop
from llm_jax.compress.quantize import quantize
from llm_jax.data import tokenizers
from llm_jax.delta import lora
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.interop.huggingface import peft
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.training import finetune
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig
from llm_jax.training.workdir import WorkdirError

pytestmark = pytest.mark.usefixtures("one_device")

TEXT = "abc abd abe, abc abd abe. " * 60
CHATS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
         for q, a in [("ab", "cd"), ("a", "cdcd"), ("abab", "c"), ("b", "cdc")] * 4]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama and a character tokenizer, as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    trained = tokenizers.train([TEXT, "u"], "char", 1)
    tokenizer = tokenizers.Tokenizer(trained.backend, None, trained.eos_ids, TEMPLATE)
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, context_length=32, model_dim=16, num_layers=2, num_heads=2,
                         num_kv_heads=1, hidden_dim=24)  # fmt: skip
    model = config.make()
    params = paths.map_with_path(lambda p, x: x * 0 + 1 if p.endswith("scale") else x, noise(model, 0.3))
    interop.save(path, model, params, tokenizer)
    (path / "text.txt").write_text(TEXT)
    (path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    return path


def config(folder, **changes):
    chat = changes.get("format") == "chat"
    data = DataConfig(
        source=str(folder / ("chats.jsonl" if chat else "text.txt")),
        split="hash" if chat else "tail",
        validation_share=0.0 if chat else 0.1,
        packing="whole" if chat else "stream",
    )
    run = RunConfig(
        data=data,
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant", weight_decay=0.0),
        training=LoopConfig(steps=STEPS, batch_size=8, sequence_length=9 if chat else 16, log_every=1),
    )
    return FinetuneConfig(run=run, **{"lora": LoraConfig(rank=3, alpha=6.0), **changes})


ROWS = {
    "float": {},
    "int8 chat": {"base": "int8", "format": "chat"},
}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Every row trained once: (config, loaded, result, work directory)."""

    @functools.cache
    def get(name):
        workdir = tmp_path_factory.mktemp("work")
        loaded = interop.load(folder)
        done = finetune.run(loaded, config(folder, **ROWS[name]), workdir, jax.random.key(0))
        return loaded, done, workdir

    return get


@pytest.fixture(scope="module")
def logits(folder):
    """One compiled forward pass."""
    loaded = interop.load(folder)
    ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 9)).astype(np.int32)
    return jax.jit(lambda params: loaded.model.apply({"params": params}, ids).logits)


def bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(paths.flatten(a), paths.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls_and_the_base_stays(name, folder, results, tmp_path):
    loaded, done, workdir = results(name)
    losses = [m["train/loss"] for m in read_metrics(workdir) if "train/loss" in m]
    assert len(losses) == STEPS and np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    if name == "float":
        assert 0 < done.trained.evaluation["eval/loss"] < losses[0]
    base = interop.load(folder).params
    base = quantize(base, LoraConfig().targets) if "int8" in name else base
    trained = done.trained.state.params
    bitwise(lora.detach(trained), base)
    assert all(x.is_deleted() for x in jax.tree.leaves(loaded.params))  # two copies would be one too many
    with pytest.raises(ValueError, match="an earlier run took these parameters over; load the model again"):
        finetune.run(loaded, config(folder), tmp_path, jax.random.key(0))
    nodes = [w for _, w in paths.flatten(trained, weights.is_node) if isinstance(w, Lora)]
    assert len(nodes) == 7 and all(np.abs(w.b).max() > 1e-3 for w in nodes)


@pytest.mark.parametrize("name", ROWS)
def test_bytes_in_closed_form(name, results):
    _, done, _ = results(name)
    sides = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    numbers = sum(2 * 3 * (i + o) for i, o in sides)
    assert done.bytes["trainable"] == 4 * numbers
    arrays = [x for x in jax.tree.leaves(done.trained.state.opt_state) if x.ndim]
    assert weights.bytes_of(arrays) == 2 * 4 * numbers  # Adam's two moments, of A and B only
    assert done.bytes["optimizer state"] - 2 * 4 * numbers <= 8  # and a counter
    assert done.bytes["parameters"] == weights.bytes_of(done.trained.state.params)
    assert f"trainable {4 * numbers:,} bytes" in done.describe()


@pytest.mark.parametrize("name", ROWS)
def test_what_is_exported_loads_back_equal(name, results, logits, tmp_path):
    loaded, done, workdir = results(name)
    trained = jax.device_put(done.trained.state.params, jax.devices()[0])
    want = logits(trained)
    merged = jax.device_put(done.merged, jax.devices()[0])
    np.testing.assert_allclose(logits(merged), want, rtol=1e-5, atol=1e-5)
    interop.save(tmp_path / "merged", loaded.model, done.merged, loaded.tokenizer)
    again = interop.load(tmp_path / "merged")
    np.testing.assert_array_equal(logits(again.params), logits(merged))
    assert again.tokenizer.encode(TEXT) == loaded.tokenizer.encode(TEXT)
    peft.save(tmp_path / "adapter", loaded.model, trained)
    adapted = peft.load(tmp_path / "adapter", loaded.model, lora.detach(trained))
    np.testing.assert_array_equal(logits(adapted), want)
    own = interop.load(workdir)  # the work directory itself
    bitwise(own.params, trained)
    assert own.config == loaded.config and own.tokenizer.chat_template == TEMPLATE


def test_only_the_assistants_words_are_trained(results):
    """Two batches are one epoch: their tokens are all characters of answers and their ends, no others."""
    _, _, workdir = results("int8 chat")
    lines = [m for m in read_metrics(workdir) if "train/targets" in m]
    counts = [m["train/targets"] for m in lines]
    assert all(m["train/tokens"] > m["train/targets"] for m in lines)  # the questions are read as well
    answers = sum(len(c["messages"][1]["content"]) + 1 for c in CHATS)
    assert counts[0] + counts[1] == counts[2] + counts[3] == answers


def test_a_finished_run_resumes_to_itself(folder, results):
    loaded, done, workdir = results("float")
    again = finetune.run(loaded, config(folder), workdir, jax.random.key(0))  # whose arrays are gone
    bitwise(again.merged, done.merged)
    assert int(again.trained.state.step) == STEPS
    with pytest.raises(WorkdirError, match="finetune.lora.alpha: 6.0 -> 9.0"):
        loaded = interop.load(folder)
        finetune.run(loaded, config(folder, lora=LoraConfig(rank=3, alpha=9.0)), workdir, jax.random.key(0))
    assert not any(x.is_deleted() for x in jax.tree.leaves(loaded.params))  # a refused run takes nothing


def test_adapting():
    params = {"mlp": {"up": {"kernel": jnp.ones((8, 8))}}, "norm": jnp.ones(8)}
    some = LoraConfig(targets=("mlp/*/kernel",))
    key = jax.random.key(0)
    assert finetune.adapt(params, FinetuneConfig(lora=None), key) is params
    assert isinstance(finetune.adapt(params, FinetuneConfig(lora=some), key)["mlp"]["up"]["kernel"].base, jax.Array)
    eight = finetune.adapt(params, FinetuneConfig(lora=some, base="int8"), key)["mlp"]["up"]["kernel"].base
    assert eight.values.dtype == jnp.int8
    assert math.isclose(float(eight.dense()[0, 0]), 1, rel_tol=1e-6)


def test_configs_round_trip_and_refuse(folder):
    for changes in ({}, {"base": "int8", "format": "chat"}, {"lora": None}):
        c = config(folder, **changes)
        assert FinetuneConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    for changes, message in [
        ({"base": "int4"}, "base='int4' is not one of float, bfloat16, int8"),
        ({"format": "html"}, "format='html' is neither text nor chat"),
        ({"base": "int8", "lora": None}, "a quantized base cannot train whole"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(folder, **changes)
    with pytest.raises(ValueError, match="has no tokenizer"):
        finetune.run(interop.load(folder)._replace(tokenizer=None), config(folder), folder, jax.random.key(0))


def test_the_config_of_a_run_names_the_loaded_model(results):
    loaded, _, workdir = results("float")
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["model"]["vocab_size"] == loaded.config.vocab_size and stored["model"]["family"] == "llama"
    assert tuple(stored["training"]["trainable"]) == lora.TRAINABLE
    # as versions without cross-attention in the default wrote it, so that their runs resume
    assert stored["finetune"]["lora"]["targets"] == ["attention/*/kernel", "mlp/*/kernel"]
    assert dataclasses.asdict(loaded.config).items() >= {"model_dim": 16, "num_layers": 2}.items()
