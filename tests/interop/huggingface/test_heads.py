"""Heads of decoders and of T5 in Hugging Face's names: one table, both ways, and from one head to another."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, GPT, LLAMA, abstract, noise

from llm_jax import interop
from llm_jax.interop.huggingface import gpt, llama, t5
from llm_jax.interop.names import InteropError
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths
from llm_jax.storage.safetensors import TensorFolder, write_folder

LABELS = ("no", "yes", "so")
SMALL = {**LLAMA, "head_dim": 4}
KINDS = {
    "gpt2": (gpt, GPTConfig(**GPT, pad_id=0), gpt.CLASSES["gpt2"]),
    "gpt1": (gpt, GPTConfig(**GPT, norm="post", tied=False), gpt.CLASSES["openai-gpt"]),
    "llama": (llama, LlamaConfig(**SMALL, tied=False), llama.CLASSES),
    "mistral": (llama, LlamaConfig(**SMALL, window=4, pad_id=2), llama.CLASSES),
    "qwen2": (llama, LlamaConfig(**SMALL, qkv_bias=True), llama.CLASSES),
    "qwen3": (llama, LlamaConfig(**SMALL, qk_norm=True), llama.CLASSES),
    "t5": (t5, dataclasses.replace(ENCODER_DECODERS["t5"], end_id=3), t5.CLASSES),
    "t5_1.1": (t5, dataclasses.replace(ENCODER_DECODERS["t5_1.1"], vocab_pad_multiple=1), t5.CLASSES),
}
CASES = [(kind, head) for kind, (_, _, classes) in KINDS.items() for head in classes]


def made(kind, head):
    family, config, _ = KINDS[kind]
    fields = {"labels": LABELS} if head in ("classification", "tokens") else {}
    fields |= {"head_dropout": 0.3} if head == "tokens" or family is t5 else {}
    fields |= {"decoder": head != "tokens"} if family is t5 else {}
    return dataclasses.replace(config, head=head, **fields)


@pytest.mark.parametrize("kind, head", CASES)
def test_configs_round_trip_and_names_are_one_to_one(kind, head):
    family, _, classes = KINDS[kind]
    config = made(kind, head)
    theirs = json.loads(json.dumps(family.config_to_hf(config)))
    assert theirs["architectures"][0].endswith(classes[head]) and family.config_from_hf(theirs) == config
    own = {p for p, _ in paths.flatten(abstract(config.make(), np.zeros((1, 2), int))[0])}
    table = [
        r for r in family.rules(config) if r.ours in own or not r.ours.endswith("bias")
    ]  # Llama's are there or not
    assert {r.ours for r in table} == own
    places = {(r.theirs, r.part and r.part[0]) for r in table}
    assert len({r.ours for r in table}) == len(places) == len(table)
    assert not any(family.ignored(config, r.theirs.format(l=0)) for r in table)


@pytest.mark.parametrize("kind, head", [("gpt2", "tokens"), ("gpt1", "classification"), ("qwen2", "span"),
                                        ("mistral", "span"), ("llama", "none"), ("t5", "classification"),
                                        ("t5_1.1", "span"), ("t5", "tokens")])  # fmt: skip
def test_folders_round_trip(kind, head, tmp_path):
    config = made(kind, head)
    params = noise(config.make(), 0.3)
    interop.save(tmp_path, config.make(), params)
    loaded = interop.load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


# from a head to another: what stays is read from where the first class has it, the rest is initialised
CHANGES = [
    ("gpt2", "lm", "classification"),
    ("gpt1", "none", "lm"),
    ("llama", "span", "tokens"),
    ("qwen3", "lm", "span"),
    ("mistral", "classification", "none"),
    ("t5_1.1", "lm", "classification"),
    ("t5", "lm", "tokens"),
    ("t5", "classification", "lm"),
]


@pytest.mark.parametrize("kind, first, then", CHANGES)
def test_another_head_on_the_same_model(kind, first, then, tmp_path):
    config = made(kind, first)
    params = noise(config.make(), 0.3)
    interop.save(tmp_path, config.make(), params)
    loaded = interop.load(tmp_path, head=then, labels=("bad", "good", "odd", "even"))
    assert loaded.config.head == then and loaded.config.num_labels == 4
    old, new = dict(paths.flatten(params)), dict(paths.flatten(loaded.params))
    fresh = {p for p in new if p.split("/")[0] in ("classifier", "pooler", "head")}
    for path in new.keys() - fresh:
        np.testing.assert_array_equal(new[path], old[path], err_msg=path)
    assert bool(fresh) == (then not in ("none", "lm") or kind in ("gpt1", "llama"))
    for path in fresh:
        assert np.isfinite(new[path]).all() and (path.endswith("bias") or np.std(new[path]) > 0.01), path
    if then in ("classification", "tokens"):
        assert new["classifier/kernel"].shape == (12, 4)
    interop.save(tmp_path / "tuned", loaded.model, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "tuned").params, loaded.params)


def test_headless_names_and_spare_tensors(tmp_path):
    """A classifier written without the prefix of its model, beside an output layer that nobody uses."""
    config = made("llama", "classification")
    params = noise(config.make(), 0.3)
    interop.save(tmp_path, config.make(), params)
    tensors = {n.removeprefix("model."): np.array(a) for n, a in TensorFolder(tmp_path).items()}
    write_folder(tmp_path, {**tensors, "lm_head.weight": np.ones((31, 12))}.items())
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path).params, params)
    loaded = interop.load(tmp_path, head="tokens", dtype="bfloat16")
    assert loaded.params["classifier"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        loaded.params["final_norm"]["scale"], params["final_norm"]["scale"].astype(jnp.bfloat16)
    )


@pytest.mark.parametrize(
    "fields, rate",
    [
        ({}, 0.1),
        ({"hidden_dropout": 0.4}, 0.4),
        ({"classifier_dropout": 0.0, "hidden_dropout": 0.4}, 0.0),
        ({"classifier_dropout": None}, 0.1),
    ],
)
def test_dropout_is_where_they_look_for_it(fields, rate):
    assert gpt.config_from_hf({"model_type": "gpt2", **fields}).head_dropout == rate


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InteropError, match="architectures 'GPT2DoubleHeadsModel' is not supported; there are GPT2Mod"):
        gpt.config_from_hf({"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]})
    with pytest.raises(InteropError, match="no Hugging Face class has head='span' there; there are OpenAIGPTModel"):
        gpt.config_to_hf(made("gpt1", "span"))
    marian = ENCODER_DECODERS["marian"].make()
    interop.save(tmp_path, marian, noise(marian, 0.3))
    with pytest.raises(InteropError, match="a marian model takes no other head"):
        interop.load(tmp_path, head="classification")
    interop.save(tmp_path / "t5", made("t5", "tokens").make(), noise(made("t5", "tokens").make(), 0.3))
    with pytest.raises(InteropError, match=r"missing decoder|missing transformer\.decoder"):
        interop.load(tmp_path / "t5", head="lm")
    with pytest.raises(InteropError, match="head='choice' is not one of none, lm"):
        interop.load(tmp_path / "t5", head="choice")
