"""BERT's kin in Hugging Face's names: configs there and back, names one to one, and what is refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, ENCODERS, abstract, noise

from llm_jax import interop
from llm_jax.interop.huggingface.bert import CLASSES, DECODERS, TABLE, config_from_hf, config_to_hf, fit, ignored, rules
from llm_jax.interop.names import InteropError
from llm_jax.models.bert import BertConfig
from llm_jax.nn import paths
from llm_jax.storage.safetensors import TensorFolder, write_folder

KINDS = {
    "bert": {},
    "roberta": {"num_token_types": 1, "position_offset": 2},
    "distilbert": {"num_token_types": 0},
    "albert": {"embedding_dim": 8, "num_groups": 2},
}


def made(kind, head):
    pooled = head in ("classification", "choice", "pretraining", "none")
    pooler = "tanh" if pooled else None
    if kind == "distilbert":
        pooler = "relu" if head in ("classification", "choice") else None
    rate = None if head == "span" and kind != "distilbert" else 0.3
    rate = None if head == "tokens" and kind == "distilbert" else rate
    return BertConfig(**BERT, **KINDS[kind], head=head, pooler=pooler, labels=("no", "yes", "so"), head_dropout=rate)


CASES = [(k, h) for k in KINDS for h in CLASSES if h != "pretraining" or TABLE[k].pair]


@pytest.mark.parametrize("kind, head", CASES)
def test_configs_round_trip_and_names_are_one_to_one(kind, head):
    config = made(kind, head)
    theirs = json.loads(json.dumps(config_to_hf(config)))
    assert theirs["model_type"] == kind and theirs["architectures"] == [TABLE[kind].title + CLASSES[head]]
    assert config_from_hf(theirs) == config
    table = rules(config)
    assert {r.ours for r in table} == {p for p, _ in paths.flatten(abstract(config.make(), np.zeros((1, 2), int))[0])}
    assert len({r.ours for r in table}) == len({r.theirs for r in table}) == len(table)
    assert not any(ignored(config, r.theirs.format(l=0)) for r in table)


def test_layers_inside_alberts_groups_are_sets_of_their_own(tmp_path):
    """4 times one of 2 groups, of 3 layers each: 12 layers with 6 sets of parameters."""
    sizes = {**BERT, "num_layers": 12, "embedding_dim": 8, "num_groups": 6, "group_size": 3}
    config = BertConfig(**sizes, head="none", head_dropout=0.3)
    theirs = config_to_hf(config)
    said = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 3}
    assert {k: theirs[k] for k in said} == said and config_from_hf(theirs) == config
    model = config.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    stored = TensorFolder(tmp_path)
    where = "encoder.albert_layer_groups.{}.albert_layers.{}.ffn.bias"
    assert {n for n in stored if n.endswith(".ffn.bias")} == {where.format(g, j) for g in range(2) for j in range(3)}
    biases = params["encoder"]["layers"]["mlp"]["up"]["bias"]
    np.testing.assert_array_equal(stored[where.format(1, 0)], biases[3])
    loaded = interop.load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert interop.load(tmp_path, head="masked_lm").config.group_size == 3


@pytest.mark.parametrize("kind, name", DECODERS.items())
def test_a_decoders_folder_is_a_masked_models_of_another_class(kind, name, tmp_path):
    config = dataclasses.replace(made(kind, "masked_lm"), causal=True)
    theirs = json.loads(json.dumps(config_to_hf(config)))
    assert (theirs["architectures"], theirs["is_decoder"]) == ([name], True) and config_from_hf(theirs) == config
    assert rules(config) == rules(made(kind, "masked_lm"))
    assert config_from_hf({**theirs, "is_decoder": False}) == made(kind, "masked_lm")  # theirs sees both sides then
    params = noise(config.make(), 0.3)
    interop.save(tmp_path, config.make(), params)
    loaded = interop.load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(InteropError, match="causal=True takes head='masked_lm' or 'none', not 'span'"):
        interop.load(tmp_path, head="span")


@pytest.mark.parametrize("name", ENCODERS)
def test_folders_round_trip(name, tmp_path):
    config = ENCODERS[name]
    model = config.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    loaded = interop.load(tmp_path)
    cut = lambda path, x: x[:31] if path in ("embed/embedding", "head/bias") else x  # padding is not written
    for (path, a), (_, b) in zip(paths.flatten(loaded.params), paths.flatten(params), strict=True):
        np.testing.assert_array_equal(a, cut(path, b), err_msg=path)


def test_old_names_prefixes_and_spare_tensors(tmp_path):
    """bert-base-uncased as it lies on the hub: gamma and beta, a pair head though its class is ForMaskedLM."""
    config = made("bert", "pretraining")
    model = config.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    tensors = {old(n): np.array(a) for n, a in TensorFolder(tmp_path).items()}
    tensors |= {"cls.predictions.decoder.weight": np.ones(3), "bert.embeddings.position_ids": np.ones(3)}
    write_folder(tmp_path, tensors.items())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["BertForMaskedLM"]}))
    loaded = interop.load(tmp_path)
    assert loaded.config.head == "pretraining"
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["BertModel"]}))
    encoder = interop.load(tmp_path)  # with the prefix of a class that has a head
    assert encoder.config.head == "none" and encoder.config.pooler == "tanh" and "head" not in encoder.params
    np.testing.assert_array_equal(encoder.params["pooler"]["kernel"], params["pooler"]["kernel"])


@pytest.mark.parametrize("kind", KINDS)
def test_another_head_on_the_same_encoder(kind, tmp_path):
    config = made(kind, "masked_lm")
    model = config.make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    loaded = interop.load(tmp_path, head="classification", labels=("bad", "good"), dtype="bfloat16")
    assert loaded.config.labels == ("bad", "good") and loaded.config.pooler is not None
    got = loaded.params
    assert got["classifier"]["kernel"].shape == (12, 2) and "head" not in got
    assert got["classifier"]["kernel"].dtype == jnp.bfloat16 and np.std(np.float32(got["pooler"]["kernel"])) > 0.01
    for a, b in zip(jax.tree.leaves(got["encoder"]), jax.tree.leaves(params["encoder"]), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    ids = jnp.ones((1, 4), jnp.int32)
    assert loaded.model.apply({"params": got}, ids).logits.shape == (1, 2)

    interop.save(tmp_path / "tuned", loaded.model, got)
    again = interop.load(tmp_path / "tuned", labels=("a", "b", "c"))  # its own head, other classes: only those are new
    assert again.params["classifier"]["kernel"].shape == (12, 3)
    np.testing.assert_array_equal(again.params["pooler"]["kernel"], got["pooler"]["kernel"])


def test_a_head_that_is_not_there_is_named(tmp_path):
    bert = made("bert", "none").make()
    interop.save(tmp_path, bert, noise(bert, 0.3))
    with pytest.raises(InteropError, match="head='regression' is not one of"):
        interop.load(tmp_path, head="regression")


def test_a_file_without_a_pooler():
    config = made("bert", "none")
    assert fit(config, ["embeddings.LayerNorm.weight"]).pooler is None
    assert fit(config, ["bert.pooler.dense.weight"]).pooler == fit(config, ["pooler.dense.weight"]).pooler == "tanh"


BASE = {"model_type": "bert"}


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"is_decoder": True, "architectures": ["BertForMultipleChoice"]},
            "is_decoder=True is not supported with BertForMultipleChoice, only with BertLMHeadModel, Roberta",
        ),
        ({"model_type": "albert", "is_decoder": True}, "is_decoder=True is not supported with AlbertModel"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported; there are gelu_new"),
        (
            {"architectures": ["BertForTheWeather"]},
            "architectures 'BertForTheWeather' is not supported; there are BertModel",
        ),
        ({"rotary_value": True}, "config.json has rotary_value, which this library does not know"),
    ],
)
def test_unsupported_fields(values, words):
    with pytest.raises(InteropError, match=words):
        config_from_hf({**BASE, **values})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_groups": 1}, "ALBERT's format has both"),
        ({"embedding_dim": 8, "num_groups": 1, "position_offset": 2}, "no position_offset"),
        ({"num_token_types": 0, "norm_eps": 1e-5, "head": "masked_lm"}, "DistilBERT's format has norm_eps=1e-12"),
        ({"position_offset": 2}, "Roberta's format has no sentence-pair head"),
        ({"head": "classification", "pooler": "relu"}, "Bert's format pools with tanh"),
        (
            {"num_token_types": 0, "causal": True, "head": "masked_lm", "pooler": None},
            "DistilBert's format has no is_decoder=True; there are bert, roberta",
        ),
    ],
)
def test_what_their_formats_cannot_say(changes, words):
    with pytest.raises(InteropError, match=words):
        config_to_hf(BertConfig(**{**BERT, **changes}))


# fields of folders that many people load, beside those that every config.json has
HUB = {
    "bert-base-multilingual-cased": dict(
        directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12, pooler_num_fc_layers=3,
        pooler_size_per_head=128, pooler_type="first_token_transform",
    ),
    "distilbert-base-uncased": dict(model_type="distilbert", tie_weights_=True, qa_dropout=0.1, output_past=True),
    "roberta-large-mnli": dict(model_type="roberta", _num_labels=3, id2label={"0": "C", "1": "N", "2": "E"}),
    "albert-base-v2": dict(
        model_type="albert", down_scale_factor=1, gap_size=0, net_structure_type=0, num_memory_blocks=0,
        layers_to_keep=[],
    ),
    "integers": dict(id2label={"0": 0, "1": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_fields_of_the_hubs_folders_are_known(name):
    assert config_from_hf({**BASE, **HUB[name]}).num_labels in (2, 3)


def test_robertas_classifier_leaves_an_unused_pooler_alone(tmp_path):
    config = made("roberta", "classification")
    model = config.make()
    interop.save(tmp_path, model, noise(model, 0.3))
    tensors = {n: np.array(a) for n, a in TensorFolder(tmp_path).items()}
    tensors |= {"roberta.pooler.dense.weight": np.ones((12, 12)), "roberta.pooler.dense.bias": np.ones(12)}
    write_folder(tmp_path, tensors.items())
    loaded = interop.load(tmp_path)
    np.testing.assert_array_equal(loaded.params["pooler"]["kernel"], tensors["classifier.dense.weight"].T)


def test_defaults_are_theirs():
    assert config_from_hf(BASE) == BertConfig(head="none")
    albert = config_from_hf({"model_type": "albert", "architectures": ["AlbertForPreTraining"]})
    assert (albert.vocab_size, albert.model_dim, albert.embedding_dim, albert.num_groups) == (30000, 4096, 128, 1)
