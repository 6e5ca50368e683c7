"""XLNet pre-trained in both directions: what is evaluated or tuned afterwards reads forwards, wholly unaware of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import one_device

from llm_jax import interop
from llm_jax.data.loader import eval_batches
from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows
from llm_jax.data.tokens import TokenStore
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.training import finetune, labeled_examples, run
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.recipes import permuted_rows
from llm_jax.training.rows import rows_of_model

BATCH, T = 4, 12
SIZES = dict(vocab_size=30, model_dim=16, num_layers=1, num_heads=2, hidden_dim=16, memory_length=8, init_std=0.5)
MODEL = XLNetConfig(**SIZES, dropout=0.0, head_dropout=0.0)
TEXT = "abc abd abe, abc abd abe. " * 60


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(work directory, the run's result)."""
    folder = tmp_path_factory.mktemp("xlnet")
    (folder / "text.txt").write_text(TEXT)
    config = run.RunConfig(
        model=MODEL,
        data=run.DataConfig(str(folder / "text.txt"), tokenizer_kind="char", validation_share=0.2, split="tail"),
        objective=PermutationLM(carry=True, both_ways=True),
        optimizer=OptimizerConfig("adam", 2e-2, schedule="constant", weight_decay=0.0),
        training=LoopConfig(2, BATCH, T),
    )
    with one_device():
        return folder / "run", run.train(config, folder / "run"), config


def test_pretraining_and_its_held_out_rows_run_both_ways(pretrained):
    _, trained, config = pretrained
    assert {"eval/loss", "eval/baseline_loss"} <= trained.evaluation.keys()
    store = TokenStore(np.arange(BATCH * T * 2, dtype=np.uint16), np.array([0, BATCH * T * 2]), None, 1)
    for held_out in (False, True):
        rows = permuted_rows(config.objective, config, trained.tokenizer, store, held_out)
        assert [bool(rows[i]["backwards"]) for i in range(BATCH)] == [False] * 2 + [True] * 2


def test_an_evaluation_reads_forwards(pretrained):
    workdir, _, config = pretrained
    model, params, tokenizer, loaded = interop.load(workdir)
    assert loaded == MODEL  # the direction is none of its fields
    objective, rows_of = rows_of_model(loaded, tokenizer, T)
    assert objective == PermutationLM() != config.objective
    store = TokenStore(np.asarray(tokenizer.encode(TEXT[: T * BATCH]), np.uint16), np.array([0, T * BATCH]), None, 1)
    (batch,) = eval_batches(rows_of(store), BATCH)
    assert "backwards" not in batch and "continues" not in batch

    @jax.jit
    def losses(params):
        """By direction of the rows, of reversed texts, and of both."""
        prepared = objective.prepare(batch, jax.random.key(0))
        out = lambda **more: model.apply({"params": params}, **prepared.inputs, **more)
        score = lambda **more: objective.score(out(**more), prepared.targets)["permuted_token"]
        ids = jnp.asarray(batch["input_ids"])
        states = lambda ids, **more: model.apply({"params": params}, ids, **more).last_hidden_state
        flags = dict(backwards=jnp.ones(BATCH, bool))
        directions = score(), score(backwards=jnp.zeros(BATCH, bool)), score(**flags)
        return directions, states(ids), states(ids[:, ::-1], **flags)[:, ::-1], states(ids[:, ::-1])[:, ::-1]

    (plain, forwards, backwards), states, reversed_text, unflagged = losses(params)
    np.testing.assert_allclose(plain, forwards, rtol=1e-6)
    assert abs(backwards - plain) > 1e-3
    np.testing.assert_allclose(reversed_text, states, rtol=1e-5, atol=1e-5)
    assert np.abs(unflagged - states).max() > 1e-2


def test_tuning_with_labels_reads_forwards(pretrained, tmp_path):
    workdir, trained, _ = pretrained
    table = ["text\tlabel", *(f"{'abc abd'[: 3 + i % 5]}\t{'ab'[i % 2]}" for i in range(24))]
    (tmp_path / "data.tsv").write_text("\n".join(table))
    tuning = run.RunConfig(
        data=run.DataConfig(str(tmp_path / "data.tsv"), fields=("text", "label"), validation_share=0.2),
        objective=Labels(),
        training=LoopConfig(2, BATCH, T, log_every=1),
    )
    config = FinetuneConfig(run=tuning, lora=None)
    own = interop.load(workdir)
    interop.save(tmp_path / "folder", own.model, own.params, own.tokenizer)
    loaded = finetune.load(str(tmp_path / "folder"), config)
    assert loaded.config == dataclasses.replace(MODEL, head="classification", labels=("a", "b"))
    before = dict(paths.flatten(jax.device_get(trained.state.params)))
    shared = {p: x for p, x in paths.flatten(jax.device_get(loaded.params)) if p in before}
    assert len(shared) >= len(before) - 2  # all but the head
    for path, x in shared.items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    examples, _ = labeled_examples.read(tuning.data, Labels())
    encoder = Encoder.of(loaded.config, loaded.tokenizer, "classification", T)
    (batch, *_) = eval_batches(LabeledRows(examples, encoder, ("a", "b"), "examples"), BATCH)
    inputs = Labels().prepare(batch, jax.random.key(0)).inputs
    assert inputs.keys() == {"input_ids", "attention_mask"}
    apply = lambda params, **flags: loaded.model.apply({"params": params}, **inputs, **flags).logits
    each = lambda params: (apply(params), *(apply(params, backwards=jnp.full(BATCH, x)) for x in (False, True)))
    plain, forwards, backwards = jax.jit(each)(loaded.params)
    np.testing.assert_allclose(forwards, plain, rtol=1e-5, atol=1e-6)
    assert np.abs(backwards - plain).max() > 1e-4
    with one_device():
        done = finetune.run(loaded, config, tmp_path / "run", jax.random.key(0))
    assert np.isfinite(done.trained.evaluation["eval/loss"])
