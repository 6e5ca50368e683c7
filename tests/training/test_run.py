"""Real runs on a few small files: start to finish, killed and resumed, and what refuses to start."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.data.corpora import CorpusError
from llm_jax.data.tokenizer import Rule, set_rule
from llm_jax.data.tokenizers import TokenizerError
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import rows, run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizers import OptimizerConfig, make_schedule
from llm_jax.training.precision import Precision
from llm_jax.training.recipes import recipe_of
from llm_jax.training.step import make_eval_step
from llm_jax.training.workdir import WorkdirError

STEPS, SAVED, KILLED = 14, 5, 8
TESTS = pathlib.Path(__file__).resolve().parents[1]


def config_of(corpus):
    """Dropout, accumulation, fp16 with a loss scale, a moving average, eight devices."""
    return run.RunConfig(
        model=GPTConfig(300, 16, 16, 2, 2, dropout=0.1, attention_dropout=0.1),
        data=run.DataConfig(str(corpus), validation_share=0.2),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=3),
        plan=PlanConfig(precision="fp16", zero=3),
        training=LoopConfig(
            STEPS, 16, 16, 2, log_every=1, checkpoint_every=SAVED, eval_every=7, ema=0.8, keep_last=3
        ),
    )  # fmt: skip


def change(config, group, **fields):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run.train(config_of(corpus), folder)


def test_a_run_learns_and_leaves_its_files(whole, corpus):
    folder, trained = whole
    rows = read_metrics(folder)
    losses = [r["train/loss"] for r in rows if "train/loss" in r]
    assert len(losses) == STEPS and losses[0] == pytest.approx(np.log(300), rel=0.05)
    assert np.mean(losses[-3:]) < losses[0] - 1.5
    evaluations = [r for r in rows if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [7, 14]
    assert trained.evaluation == {k: v for k, v in evaluations[-1].items() if k != "step"}
    assert trained.evaluation["eval/loss"] < losses[0] - 1.5
    files = ("config.json", "metrics.jsonl", "loss.png", "tokenizer.json", "tensorboard", "tokens")
    assert all((folder / name).exists() for name in files)
    described, dtypes = (folder / "parameters.txt").read_text().split("\n\n")
    table = dict(line.split("  ", 1) for line in described.splitlines()[1:])
    assert "master copy   the parameters" in dtypes
    eighth = "float32[2, 16, 64]  ('layers', 'embed', 'mlp')  (None, 'data', None)  1,024 B"
    assert table["decoder/layers/mlp/up/kernel"] == eighth
    assert Checkpoints(folder / "checkpoints", read_only=True).steps() == [5, 10, 14]
    assert run.load_config(folder) == config_of(corpus)
    assert int(trained.state.step) == STEPS and trained.tokenizer.vocab_size <= 300
    logits = jax.jit(lambda p, ids: trained.model.apply({"params": p}, ids).logits)(
        trained.state.params, np.zeros((1, 4), int)
    )
    assert np.isfinite(logits).all()


def test_the_average_is_what_is_measured_and_handed_on(whole):
    """By evaluations and so by keep_best, by `Trained.params`, and by loading; the last parameters are there too."""
    folder, trained = whole
    average = jax.device_get(trained.state.average)
    for given in (trained.params, interop.load(folder).params):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(given), average)
    last = interop.load(folder, average=False).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(last), jax.device_get(trained.state.params))

    config = run.load_config(folder)
    source = recipe_of(config.objective).source
    held_out = source.rows(config, trained.tokenizer, folder, None, "text", None).held_out
    step = jax.jit(make_eval_step(trained.model, CausalLM(), Precision("fp16")))
    losses = [
        run.evaluate_rows(CausalLM(), step, params, held_out, config.training.batch_size, 0, dict)["eval/loss"]
        for params in (average, last)
    ]
    measured = trained.evaluation["eval/loss"]
    assert measured == pytest.approx(losses[0], rel=1e-3) and measured != pytest.approx(losses[1], rel=1e-2)


def test_the_learning_rate_is_logged(whole, corpus):
    rate = make_schedule(config_of(corpus).optimizer, STEPS)
    logged = [r["train/learning_rate"] for r in read_metrics(whole[0]) if "train/loss" in r]
    assert logged == [pytest.approx(float(rate(step))) for step in range(STEPS)]


KILL = f"""
import os, pathlib, pickle, signal, sys, time
import conftest
conftest.pytest_configure(None)
from llm_jax.training import run
config, folder = pickle.load(open(sys.argv[1], "rb"))
take, count = run.Loader.__next__, 0

def next_or_die(self):
    global count
    count += 1
    if count == {KILLED}:
        while not (pathlib.Path(folder) / "checkpoints" / "{SAVED}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self)

run.Loader.__next__ = next_or_die
run.train(config, folder)
"""


def test_killed_and_resumed_ends_bitwise_equal(whole, corpus, tmp_path):
    folder = tmp_path / "killed"
    with open(tmp_path / "arguments", "wb") as f:
        pickle.dump((config_of(corpus), str(folder)), f)
    command = [sys.executable, "-c", KILL, str(tmp_path / "arguments")]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert Checkpoints(folder / "checkpoints", read_only=True).steps() == [SAVED]

    resumed = run.train(config_of(corpus), folder)
    straight = whole[1]
    raw = lambda state: paths.flatten(state.replace(key=jax.random.key_data(state.key)))
    assert int(straight.state.loss_scale.good_steps) == STEPS  # counted across the kill
    for (path, a), (_, b) in zip(raw(resumed.state), raw(straight.state), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert resumed.evaluation == straight.evaluation
    position = [Checkpoints(f / "checkpoints", read_only=True).read_run()[1]["data"] for f in (folder, whole[0])]
    assert position[0] == position[1]
    timeless = lambda f: [{k: v for k, v in r.items() if "per_second" not in k} for r in read_metrics(f)]
    assert timeless(folder) == timeless(whole[0])  # no line twice, none missing, all equal


@pytest.mark.parametrize(
    "fields, accumulation",
    [
        (dict(data=4, model=2, zero=3, unroll=True), 2),
        (dict(data=4, pipe=2, microbatches=2, schedule="1f1b", zero=2), 1),
    ],
)
def test_an_older_checkpoint_goes_on_upon_another_mesh(whole, corpus, tmp_path, fields, accumulation):
    """The same data and dropout (a pipeline's micro-batches are accumulation's): losses agree to fp16's rounding."""
    folder = tmp_path / "again"
    shutil.copytree(whole[0], folder)
    before = {r["step"]: r["train/loss"] for r in read_metrics(folder) if "train/loss" in r}
    config = change(change(config_of(corpus), "plan", **fields), "training", accumulation=accumulation)
    again = run.train(config, folder, restore_step=10)
    after = {r["step"]: r["train/loss"] for r in read_metrics(folder) if "train/loss" in r}
    assert after.keys() == before.keys() and [after[s] for s in range(1, 11)] == [before[s] for s in range(1, 11)]
    for step in range(11, STEPS + 1):
        assert after[step] == pytest.approx(before[step], rel=3e-3), step
    stored, _ = Checkpoints(folder / "checkpoints", read_only=True).restore_params()
    for (path, a), b in zip(paths.flatten(stored), jax.tree.leaves(again.state.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)  # the newest checkpoint is this run's


@pytest.mark.parametrize(
    "group, fields, error, words",
    [
        ("training", {"sequence_length": 17}, ValueError, "sequence_length=17 exceeds model.context_length=16"),
        ("training", {"batch_size": 24}, ValueError, r"training.batch_size=24 does not divide by 16"),
        ("plan", {"data": 3}, ValueError, "need 3 devices, there are 8"),
        ("model", {"vocab_size": 40}, TokenizerError, "entries, the model only 40: set --config.model.vocab_size="),
        ("data", {"source": "EMPTY"}, CorpusError, "matches no readable file|holds no"),
        ("data", {"source": "BLANK"}, CorpusError, "holds no"),
        ("data", {"source": "/no/such/folder"}, CorpusError, "no corpus at '/no/such/folder'"),
        ("data", {"source": "SHORT"}, CorpusError, "tokens are too few for one row of 16"),
        ("data", {"tokenizer": "/no/such/file"}, TokenizerError, "/no/such/file"),
        (
            "data",
            {"cache": "gs://bucket/tokens"},
            ValueError,
            "cannot lie in gs://bucket/tokens: set --config.data.cache=FOLDER, loc",
        ),
        ("optimizer", {"decay": ("*kernle",)}, ValueError, r"pattern '\*kernle' matches no parameter"),
    ],
)
def test_what_refuses_to_start(corpus, tmp_path, whole, group, fields, error, words):
    fields = dict(fields)
    if fields.get("source", "").isupper():
        folder = tmp_path / "source"
        folder.mkdir()
        if fields["source"] != "EMPTY":
            (folder / "a.txt").write_text("" if fields["source"] == "BLANK" else "the cat")
        fields["source"] = str(folder)
    config = config_of(corpus)
    if group != "data" or "tokenizer" not in fields:
        config = change(config, "data", tokenizer=str(whole[0]))
    with pytest.raises(error, match=words) as e:
        run.train(change(config, group, **fields), tmp_path / "run")
    assert "\n" not in str(e.value)  # one line


def test_another_config_is_refused_in_a_used_folder(whole, corpus):
    with pytest.raises(WorkdirError, match=r"optimizer.learning_rate: 0.02 -> 0.5"):
        run.train(change(config_of(corpus), "optimizer", learning_rate=0.5), whole[0])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: run.DataConfig(packing="tight"), "packing='tight' is neither stream nor whole"),
        (lambda: run.DataConfig(validation_share=1.0), "validation_share=1.0 must lie in"),
        (lambda: run.RunConfig.from_dict({"modle": {}}), "unknown field modle; did you mean model"),
        (lambda: run.load_config("/no/such/run"), "/no/such/run holds no run: config.json is missing"),
        (
            lambda: rows.check_cache(run.DataConfig(), "gs://bucket/7b"),
            "cannot lie in gs://bucket/7b: set --config.data.c",
        ),
    ],
)
def test_config_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_remote_work_directory_needs_a_local_cache_only():
    rows.check_cache(run.DataConfig(cache="/tmp/tokens"), "gs://bucket/7b")


def test_config_file_is_the_config(whole, corpus):
    assert json.loads((whole[0] / "config.json").read_text()) == config_of(corpus).to_dict()


def test_what_whole_documents_lose_stands_beside_the_evaluation(tmp_path, monkeypatch):
    """Without a run: what it would be measured with."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 20 * (i % 3 + 1)}) + "\n" for i in range(60))
    )
    seen = []
    monkeypatch.setattr(run, "run_program", lambda *given: seen.append(given[4]) or (None, {}))
    data = run.DataConfig(str(tmp_path / "a.jsonl"), tokenizer_kind="char", validation_share=0.3, packing="whole")
    plain = config_of("").training
    config = run.RunConfig(model=GPTConfig(300, 64, 16, 1, 2), data=data, training=plain)
    config = change(config, "training", sequence_length=64, accumulation=1)
    run.train(config, tmp_path / "whole")
    run.train(change(config, "data", packing="stream"), tmp_path / "stream")
    whole, stream = (held_out.constants for held_out in seen)
    assert whole["eval/cut_tokens"] == seen[0].rows.cut_tokens > 0 and set(stream) == {"eval/baseline_loss"}


def test_a_run_of_an_earlier_version_is_told_that_its_rows_change(tmp_path, monkeypatch, caplog):
    """Its rows had nothing that the tokenizer's rule puts around a text, and it stored no digests."""
    monkeypatch.setattr(run, "run_program", lambda *given: (None, {}))
    (tmp_path / "a.txt").write_text("abcd " * 80)
    tokenizer = tokenizers.train(["abcd "], "char", 1, ("<end>", "<s>"))
    set_rule(tokenizer.backend, Rule((1,)))
    tokenizer.save(tmp_path / "tokenizer")
    data = run.DataConfig(str(tmp_path / "a.txt"), str(tmp_path / "tokenizer"), validation_share=0.2, split="tail")
    config = run.RunConfig(model=GPTConfig(16, 16, 16, 1, 2), data=data, training=config_of("").training)
    config, work = change(config, "training", accumulation=1), tmp_path / "work"
    run.train(config, work)
    (work / "checkpoints" / "5").mkdir(parents=True)
    (work / "data.json").unlink()
    for _ in range(2):
        with pytest.raises(
            WorkdirError, match="lack '<s>', which its tokenizer puts around a text: --accept_changed_da"
        ):
            run.train(config, work)
    run.train(config, work, accept_changed_data=True)
    assert "from here on they have it" in caplog.text
    run.train(config, work)


def test_processes_that_read_different_data_are_refused(monkeypatch):
    first = [{"input_ids": np.arange(3)}, {"input_ids": np.arange(3, 6)}]
    run._check_same_rows(first)
    for others, same in (([4, 4], True), ([4, 5], False)):
        monkeypatch.setattr(run.jax, "process_count", lambda: 2)
        gather = lambda own, others=others: np.stack([own * 0 + n for n in others])
        monkeypatch.setattr(run.multihost_utils, "process_allgather", gather)
        if same:
            run._check_same_rows(first)
        else:
            with pytest.raises(CorpusError, match=r"the processes read different data \(rows: 4, 5\)"):
                run._check_same_rows(first)


def test_every_file_of_a_tokenizers_folder_counts(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    folder = tmp_path / "tokenizer"
    tokenizers.train(["a b"], "char", 1).save(folder)
    (folder / "merges.txt").write_text("")
    found = rows.data_digests(run.DataConfig(str(tmp_path / "a.txt"), tokenizer=str(folder)))
    assert {pathlib.Path(p).name for p in found} == {"a.txt", "tokenizer.json", "tokenizer_config.json", "merges.txt"}


@pytest.mark.parametrize("which", ["source", "tokenizer"])
def test_a_replaced_file_stops_a_run_that_resumes(which, tmp_path, monkeypatch):
    """Without a run: whether it would go on, and on which tokens."""
    corpus, entries = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    corpus.write_text("abcd " * 80)
    tokenizers.train(["abcde "], "char", 1).backend.save(str(entries))
    data = run.DataConfig(str(corpus), str(entries), validation_share=0.2, split="tail")
    config = run.RunConfig(model=GPTConfig(16, 16, 16, 1, 2), data=data, training=config_of("").training)
    config = change(config, "training", accumulation=1)
    seen = []
    monkeypatch.setattr(run, "run_program", lambda *given: seen.append(next(given[3])["input_ids"]) or (None, {}))
    work = tmp_path / "work"
    run.train(config, work)
    (work / "checkpoints" / "5").mkdir(parents=True)
    run.train(config, work)
    np.testing.assert_array_equal(*seen)
    if which == "source":
        corpus.write_text("abce " * 80)
    else:
        tokenizers.train(["eeedcba "], "char", 1).backend.save(str(entries))
    changed = corpus if which == "source" else entries
    with pytest.raises(WorkdirError, match=f"{changed.name} was replaced .*; --accept_changed_data resumes"):
        run.train(config, work)
    assert len(seen) == 2
    run.train(config, work, accept_changed_data=True)
    run.train(config, work)  # what was accepted is the run's data now
    assert len(seen) == 4 and (seen[3] != seen[1]).any()
    np.testing.assert_array_equal(seen[2], seen[3])
