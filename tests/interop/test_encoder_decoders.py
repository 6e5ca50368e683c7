"""T5 and Marian in Hugging Face's names: configs there and back, names one to one, and what is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, V, abstract, noise

from llm_jax import interop
from llm_jax.interop.huggingface import marian, t5
from llm_jax.interop.names import InteropError
from llm_jax.nn import paths
from llm_jax.storage.safetensors import TensorFolder, write_folder

MARIAN = dataclasses.replace(ENCODER_DECODERS["marian"], init_std=0.05, banned_ids=(0,))
MODELS = {
    "marian": (marian, MARIAN),
    "marian_uneven": (marian, dataclasses.replace(MARIAN, num_decoder_heads=4, decoder_hidden_dim=14)),
    "t5": (t5, ENCODER_DECODERS["t5"]),
    "t5_1.1": (t5, ENCODER_DECODERS["t5_1.1"]),
    "mt5_tied": (t5, dataclasses.replace(ENCODER_DECODERS["t5_1.1"], tied=True)),
    "t5_encoder": (t5, dataclasses.replace(ENCODER_DECODERS["t5"], decoder=False, head="none")),
}


@pytest.mark.parametrize("name", MODELS)
def test_configs_round_trip_and_names_are_one_to_one(name):
    family, config = MODELS[name]
    config = dataclasses.replace(config, vocab_pad_multiple=1)
    theirs = json.loads(json.dumps(family.config_to_hf(config)))
    assert family.config_from_hf(theirs) == config
    table = family.rules(config)
    assert {r.ours for r in table} == {p for p, _ in paths.flatten(abstract(config.make(), np.zeros((1, 2), int))[0])}
    assert len({r.ours for r in table}) == len({r.theirs for r in table}) == len(table)
    assert not any(family.ignored(config, r.theirs.format(l=0)) for r in table)


@pytest.mark.parametrize("name", MODELS)
def test_folders_round_trip(name, tmp_path):
    _, config = MODELS[name]
    model = config.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    loaded = interop.load(tmp_path)
    assert loaded.config == dataclasses.replace(config, vocab_pad_multiple=1)
    rows = {"embed/embedding": (slice(0, V),), "head/kernel": (slice(None), slice(0, V))}  # padding is not written
    for (path, a), (_, b) in zip(paths.flatten(loaded.params), paths.flatten(params), strict=True):
        np.testing.assert_array_equal(a, b[rows.get(path, ...)], err_msg=path)


def test_copies_and_what_newer_folders_write(tmp_path):
    """Tied copies in the file, an untied head that the config calls tied, bans in generation_config.json."""
    _, config = MODELS["t5_1.1"]
    params = noise(config.make(), 0.3)
    interop.save(tmp_path, config.make(), params)
    tensors = {n: np.array(a) for n, a in TensorFolder(tmp_path).items()}
    tensors |= {f"{s}.embed_tokens.weight": tensors["shared.weight"] for s in ("encoder", "decoder")}
    write_folder(tmp_path, tensors.items())
    file = tmp_path / "config.json"
    newer = {"tie_word_embeddings": True, "scale_decoder_outputs": False, "dense_act_fn": "gelu_new"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **newer}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bad_words_ids": [[7], [9]]}))
    loaded = interop.load(tmp_path)
    assert not loaded.config.tied and not loaded.config.scale_output and loaded.config.banned_ids == (7, 9)
    np.testing.assert_array_equal(loaded.params["head"]["kernel"], params["head"]["kernel"][:, :V])


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh' is not supported"),
        ("t5", {"feed_forward_proj": "twice-relu"}, "feed_forward_proj='twice-relu' is not supported"),
        ("t5", {"architectures": ["T5Stack"]}, "architectures 'T5Stack' is not supported"),
        ("t5", {"use_magic": True}, "config.json has use_magic, which this library does not know"),
        ("t5", {"bad_words_ids": [[1, 2]]}, r"bad_words_ids=\[\[1, 2\]\] has sequences of several tokens"),
        ("marian", {"decoder_vocab_size": 11}, "decoder_vocab_size=11 differs from vocab_size"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False is not"),
        ("marian", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1 is not supported, only 0.0"),
        ("marian", {"activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ("marian", {"architectures": ["MarianForCausalLM"]}, "architectures 'MarianForCausalLM' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(name, changes, words):
    family, config = MODELS[name]
    with pytest.raises(InteropError, match=words):
        family.config_from_hf({**family.config_to_hf(config), **changes})


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: marian.config_to_hf(ENCODER_DECODERS["transformer"]), "Marian's format has sinusoids='halves'"),
        (lambda: marian.config_to_hf(ENCODER_DECODERS["transformer_pre"]), "Marian's format has norm='post'"),
        (lambda: t5.config_to_hf(dataclasses.replace(MODELS["t5"][1], tied=False)), "scales the output of tied"),
        (lambda: t5.config_to_hf(dataclasses.replace(MODELS["t5_1.1"][1], activation="gelu")), "no exact gelu"),
    ],
)
def test_what_their_formats_cannot_say(make, words):
    with pytest.raises(InteropError, match=words):
        make()


def test_initial_values_are_t5s():
    config = dataclasses.replace(ENCODER_DECODERS["t5"], model_dim=48, num_heads=4, head_dim=24, hidden_dim=64)
    boxed = jax.jit(config.make().init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    params = dict(paths.flatten(jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: hasattr(b, "value"))))
    layer = "params/encoder/layers"
    for name, std in (
        (f"{layer}/attention/query/kernel", (48 * 24) ** -0.5),
        (f"{layer}/attention/key/kernel", 48**-0.5),
        (f"{layer}/attention/out/kernel", (4 * 24) ** -0.5),
        (f"{layer}/mlp/up/kernel", 48**-0.5),
        (f"{layer}/mlp/down/kernel", 64**-0.5),
        ("params/embed/embedding", 1.0),
    ):
        np.testing.assert_allclose(np.std(params[name]), std, rtol=0.1, err_msg=name)
