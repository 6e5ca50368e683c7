"""Runs with labels: a toy task is learned and resumes to itself, whole or beside a frozen base."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import one_device
from tiny_models import BERT, noise

from llm_jax import config as configs
from llm_jax import interop
from llm_jax.data.corpora import CorpusError
from llm_jax.decoding.predict import predict
from llm_jax.delta import lora
from llm_jax.models.bert import BertConfig
from llm_jax.models.elmo import ElmoConfig
from llm_jax.nn import paths
from llm_jax.objectives.labels import Labels
from llm_jax.training import finetune, run
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.trainable import combine, partition

GOOD, BAD, REST = ["fine", "lovely", "warm"], ["dull", "cold", "grey"], ["a", "the", "film", "day", "was", "it"]
SIZES = {**BERT, "vocab_size": 120, "model_dim": 24, "hidden_dim": 32, "num_layers": 1, "dropout": 0.0,
         "attention_dropout": 0.0}  # fmt: skip
MODEL = BertConfig(**SIZES, head="classification", labels=("bad", "good"))
STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences with one word that decides; the tags say which."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    table, tagged = ["text\tlabel"], []
    for i in range(240):
        words = [*rng.choice(REST, 3), rng.choice(GOOD if i % 2 else BAD)]
        rng.shuffle(words)
        table.append(" ".join(words) + "\t" + ("good" if i % 2 else "bad"))
        tagged += [f"{w}\t{'G' if w in GOOD else 'B' if w in BAD else 'O'}" for w in words] + [""]
    (folder / "train.tsv").write_text("\n".join(table[:200]))
    (folder / "dev.tsv").write_text("\n".join([table[0], *table[200:]]))
    (folder / "train.conll").write_text("\n".join(tagged))
    return folder


def config_of(data, model=MODEL, steps=STEPS, **changes):
    fields = {"validation": str(data / "dev.tsv"), "fields": ("text", "label"), "tokenizer_kind": "wordpiece"}
    return run.RunConfig(
        model=model,
        data=run.DataConfig(str(data / "train.tsv"), **{**fields, **changes}),
        objective=Labels(),
        optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup_steps=4, weight_decay=0.0),
        training=LoopConfig(steps, 16, 8, log_every=1, checkpoint_every=15),
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return run.train(config_of(data), workdir), workdir


def bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(paths.flatten(a), paths.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def test_a_separable_task_is_learned(data, trained):
    done, workdir = trained
    assert done.evaluation["eval/accuracy"] > 0.97 and done.evaluation["eval/loss"] < 0.4
    assert done.evaluation.keys() == {"eval/loss", "eval/accuracy", "eval/baseline_loss"}
    assert done.evaluation["eval/baseline_loss"] == pytest.approx(np.log(2), abs=0.01)
    rows = [r for r in read_metrics(workdir) if "train/loss" in r]
    assert rows[0]["train/tokens"] == 16 * 6  # four words between [CLS] and [SEP]
    assert rows[0]["train/label"] == rows[0]["train/loss"] and (workdir / "loss.png").exists()
    loaded = interop.load(workdir)
    said = predict(loaded.model, loaded.params, loaded.tokenizer, [("the day was lovely",), ("it was grey",)], 8, 4)
    assert [s["label"] for s in said] == ["good", "bad"] and all(s["probability"] > 0.8 for s in said)
    assert sum(said[0]["probabilities"].values()) == pytest.approx(1)


def test_a_run_resumes_to_the_same_parameters(data, trained, tmp_path):
    run.train(config_of(data, steps=15), tmp_path)
    bitwise(run.train(config_of(data), tmp_path).state.params, trained[0].state.params)


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """The trained encoder without its head, as a Hugging Face folder."""
    folder, done = tmp_path_factory.mktemp("base"), trained[0]
    kept = {k: v for k, v in done.state.params.items() if k != "classifier"}
    interop.save(folder, dataclasses.replace(MODEL, head="none").make(), kept, done.tokenizer)
    return folder


def test_beside_lora_the_head_trains_and_nothing_else(data, base, tmp_path):
    config = FinetuneConfig(run=config_of(data, steps=15), lora=lora.LoraConfig(rank=2, alpha=2.0))
    loaded = finetune.load(str(base), config)
    assert loaded.config.labels == ("bad", "good") and loaded.config.head == "classification"
    before = jax.device_get(loaded.params)
    with one_device():
        done = finetune.run(loaded, config, tmp_path / "run", jax.random.key(0))
    after = jax.device_get(lora.detach(done.trained.state.params))
    moved = {p.split("/")[0] for (p, a), (_, b) in zip(paths.flatten(before), paths.flatten(after), strict=True)
             if (np.asarray(a) != b).any()}  # fmt: skip
    assert moved == {"classifier", "pooler"} and done.trained.evaluation["eval/accuracy"] > 0.9
    interop.save(tmp_path / "merged", loaded.model, done.merged, loaded.tokenizer)
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored["id2label"] == {"0": "bad", "1": "good"}
    assert stored["architectures"] == ["BertForSequenceClassification"]
    again = finetune.load(str(tmp_path / "merged"), config)  # its own head is taken up
    bitwise(jax.device_get(again.params), jax.device_get(done.merged))


def tagging(data, trainable, steps, rate):
    """A run over words and tags."""
    whole = config_of(data, steps=steps)
    return dataclasses.replace(
        whole,
        data=run.DataConfig(str(data / "train.conll"), fields=("1", "2"), validation_share=0.2),
        objective=Labels("tokens"),
        optimizer=dataclasses.replace(whole.optimizer, learning_rate=rate),
        training=dataclasses.replace(whole.training, trainable=trainable),
    )


def test_tags_are_learned(data, base, tmp_path):
    config = FinetuneConfig(run=tagging(data, None, 30, 0.02), lora=None)
    loaded = finetune.load(str(base), config)
    with one_device():
        done = finetune.run(loaded, config, tmp_path, jax.random.key(0))
    assert done.trained.evaluation["eval/accuracy"] > 0.97
    said = predict(loaded.model, done.merged, loaded.tokenizer, [("the", "grey", "day"), ("warm",)])
    assert [s["tags"] for s in said] == [["O", "B", "O"], ["G"]]


ELMO = ElmoConfig(vocab_size=9, max_characters=8, character_dim=4, widths=(1, 2), filters=(16, 16), num_highways=1,
                  model_dim=32, hidden_dim=24)  # fmt: skip
FROZEN = ("mix/*", "classifier/*")


def elmo_params(model):
    """As `noise`, with the row of zeros that stands for no character."""
    clear = lambda p, x: x.at[0].set(0) if p == "words/characters/embedding" else x
    return paths.map_with_path(clear, noise(model, 0.5))


def test_features_of_a_frozen_elmo(data, tmp_path):
    if importlib.util.find_spec("h5py") is None:
        pytest.skip("ELMo's files are HDF5")
    interop.save(tmp_path / "elmo", ELMO.make(), elmo_params(ELMO.make()))
    config = FinetuneConfig(run=tagging(data, FROZEN, 40, 0.1), lora=None)
    loaded = finetune.load(str(tmp_path / "elmo"), config)
    assert (loaded.config.vocab_size, loaded.config.dropout, loaded.config.labels) == (0, 0.0, ("B", "G", "O"))
    np.testing.assert_array_equal(loaded.params["mix"]["weights"], np.zeros(3))
    before = jax.device_get(loaded.params)
    with one_device():
        done = finetune.run(loaded, config, tmp_path / "run", jax.random.key(0))
    assert done.trained.evaluation["eval/loss"] < 0.75 * done.trained.evaluation["eval/baseline_loss"]
    moved = {p for (p, a), (_, b) in zip(paths.flatten(before), paths.flatten(done.merged), strict=True)
             if (np.asarray(a) != b).any()}  # fmt: skip
    assert moved == {"mix/weights", "mix/gamma", "classifier/kernel", "classifier/bias"}
    again = interop.load(tmp_path / "run")  # the work directory is the model
    words = [("the", "grey", "day"), ("warm",)]
    said = [predict(again.model, p, again.tokenizer, words) for p in (again.params, done.merged)]
    assert said[0] == said[1] and [len(s["tags"]) for s in said[0]] == [3, 1]
    assert not finetune.can_save(again.config)
    with pytest.raises(interop.InteropError, match="ELMo's format has no place for head='tokens'"):
        interop.save(tmp_path / "x", again.model, again.params)


def test_no_gradient_crosses_a_frozen_elmo():
    """Its LSTMs are scans: the gradient's program holds those of the forward pass and no more."""
    config = dataclasses.replace(ELMO, vocab_size=0, head="classification")
    model, ids = config.make(), np.ones((2, 5, 8), np.int32)
    params = noise(model, 0.5)

    def loss(trainable, frozen):
        out = model.apply({"params": combine(trainable, frozen)}, ids, train=True, rngs={"dropout": jax.random.key(0)})
        return jnp.sum(out.logits**2)

    scans = lambda program: str(program).count("scan[")
    learn, rest = partition(params, FROZEN)
    forward = scans(jax.make_jaxpr(loss)(learn, rest))
    assert forward > 0 and scans(jax.make_jaxpr(jax.grad(loss))(learn, rest)) == forward
    assert scans(jax.make_jaxpr(jax.grad(loss))(*partition(params, None))) > forward
    grads = jax.eval_shape(jax.grad(loss), learn, rest)
    assert sorted(p for p, _ in paths.flatten(grads)) == sorted(p for p, _ in paths.flatten(learn))
    assert len(jax.tree.leaves(grads)) == 4


MISFITS = [
    ({}, {"head": "tokens"}, Labels(), "needs model.head='classification', not 'tokens'"),
    ({}, {"labels": ("x",)}, Labels(), "kind='classification' needs labels, not"),
    ({}, {}, Labels("regression"), "kind='regression' needs one label, not"),
    ({}, {"labels": ("bad", "best")}, Labels(), "lacks good: set --config.model.labels"),
    ({"fields": ("text",)}, {}, Labels(), "must name a text, perhaps a second one, and the label"),
    ({"packing": "whole"}, {}, Labels(), "labelled examples are rows of their own: leave data.packing"),
    ({"validation": "nowhere.tsv"}, {}, Labels(), "no corpus at 'nowhere.tsv'"),
]


@pytest.mark.parametrize("changes, fields, objective, message", MISFITS, ids=range(len(MISFITS)))
def test_what_does_not_fit(changes, fields, objective, message, data, tmp_path):
    config = config_of(data, dataclasses.replace(MODEL, **fields), **changes)
    with pytest.raises((ValueError, CorpusError), match=message):
        run.train(dataclasses.replace(config, objective=objective), tmp_path)


def test_labels_have_fields_of_their_own(data, tmp_path):
    with pytest.raises(configs.ConfigError, match="data.validation is of labelled examples"):
        run.train(run.RunConfig(data=run.DataConfig(validation="a.tsv")), tmp_path)
    with pytest.raises(configs.ConfigError, match="must name a source and a target"):
        run.train(run.RunConfig(data=run.DataConfig(fields=("a", "b", "c"))), tmp_path)
    with pytest.raises(ValueError, match="format='chat' has no labels"):
        FinetuneConfig(run=config_of(data), format="chat")


def test_without_a_held_out_part_nothing_is_evaluated(data, tmp_path, caplog):
    config = config_of(data, steps=1, validation=None, validation_share=0.0)
    assert run.train(config, tmp_path).evaluation == {}
