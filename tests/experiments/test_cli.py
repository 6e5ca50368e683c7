"""Binaries: mistakes are one line with an exit code, and what they print equals a direct computation."""

import dataclasses
import json
import logging
import lzma
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binaries import binary, call, in_a_process

from experiments import cli
from experiments.configs import demo
from experiments.configs import finetune as finetune_experiment
from llm_jax import interop, training
from llm_jax.config import ConfigError
from llm_jax.delta.lora import LoraConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.tasks import report
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig, TrainingError
from llm_jax.training.run_config import RunConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "abc abd abe, abc abd abe. " * 20
DEMO = f"--config={ROOT}/experiments/configs/demo.py:tiny"
FINETUNE = f"--config={ROOT}/experiments/configs/finetune.py"


@pytest.fixture
def quiet():
    """Puts back the loggers that a binary sets up."""
    names = (None, "llm_jax", "experiments", "absl")
    kept = [(x, x.level, x.propagate, list(x.handlers)) for x in map(logging.getLogger, names)]
    yield
    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


MISTAKES = [
    ("train", (DEMO, "--config.training.stepz=3"), "unknown config field 'stepz' Did you mean steps instead of stepz?"),
    ("train", (DEMO, "--config.modle.num_layers=3"), "Did you mean model instead of modle?"),
    ("train", (DEMO, "--config.training.steps=many"), "--config.training.steps=many: invalid literal for int()"),
    ("train", (DEMO, "--config.plan.unroll=perhaps"), "--config.plan.unroll=perhaps"),
    ("train", (DEMO.replace("tiny", "huge"),), "variant 'huge' is neither empty nor tiny"),
    ("train", ("--config=none.py", "--config.training.steps=3"), "no config file at none.py"),
    ("train", ("--config", "none.py:tiny"), "no config file at none.py"),
    ("train", ("--confg=x",), "Unknown command line flag 'confg'. Did you mean: config"),
    ("train", (DEMO, "--samples=-1"), "--samples"),
    ("finetune", (FINETUNE, "--model=x", "--config.lora.rankk=3"), "Did you mean rank instead of rankk?"),
    ("finetune", (FINETUNE,), "--model must have a value"),
    ("generate", ("--model=x", "--max_new_tokens=0"), "--max_new_tokens"),
    ("evaluate", ("--model=x", "--next=caf\udce9"), "--next=caf?: is not UTF-8 at character 3"),
    ("generate", ("--model=x", "--chat", "--system=\udcff"), "--system=?: is not UTF-8 at character 0"),
    ("generate", ("--model=x", "--stop=\udcff"), "is not UTF-8 at character 0"),
    ("ngram", ("next", "--model=x", "--after=\udcff"), "--after=?: is not UTF-8 at character 0"),
    ("word2vec", ("nearest", "--vectors=x", "--word=\udcff"), "--word=?: is not UTF-8 at character 0"),
    ("predict", ("--model=x", "--question=\ud83d"), "--question=?: is not UTF-8 at character 0"),
    ("convert", ("--model=x",), "--out must have a value"),
    ("convert", ("--model=x", "--out=y", "--dtype=int3"), "--dtype=int3"),
]


@pytest.mark.parametrize("name, arguments, message", MISTAKES)
def test_mistakes_in_flags_are_one_line(name, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop, binary(name, *arguments):
        pass
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and "\\" not in error


@pytest.fixture(scope="module")
def processed(folder, tmp_path_factory):
    """A process that runs several commands: each one's end, and the folder of the first, which profiles two steps."""
    path = tmp_path_factory.mktemp("processed")
    values = {"data.source": folder / "text.txt", "data.tokenizer": folder, "data.split": "tail"}
    values |= {"training.steps": 4, "training.profile_start": 2, "training.profile_steps": 2}
    work = f"--workdir={path}/work"
    commands = [
        ("train", DEMO, f"--workdir={path}/profiled", "--samples=0", *(f"--config.{k}={v}" for k, v in values.items())),
        ("finetune", "--model=x", "--config.lora.rankk=3"),
        ("train", DEMO, work, "--config.data.source=/none.txt"),
        ("ngram", "next"),
        ("train", DEMO, work, "--config.model.num_heads=5"),
    ]
    return in_a_process(commands), path / "profiled"


ENDS = [
    (1, 2, "unknown config field 'rankk' Did you mean rank"),
    (2, 1, "no corpus at '/none.txt': give a file"),
    (3, 1, "error: --model is missing\n"),
    (4, 2, "model_dim=32 is not a multiple of num_heads=5"),
]


@pytest.mark.parametrize("number, code, message", ENDS)
def test_exit_codes_of_the_commands(number, code, message, processed):
    done = processed[0][number]
    errors = [line for line in done.err.splitlines(keepends=True) if line.startswith("error: ")]
    assert done.code == code and "Traceback" not in done.err
    assert len(errors) == 1 and message in errors[0] and done.err.strip().endswith(errors[0].strip())
    assert number != 3 or done.err == message


def test_a_profiler_window(processed):
    """In a process of its own: the profiler hooks into whatever else runs."""
    (done, *_), folder = processed
    assert done.code == 0, done.err
    (profile,) = folder.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"jit_step" in profile.read_bytes()


RAISED = [
    (ValueError("one\ntwo"), 1, "error: one\n"),
    (ConfigError("no such field"), 2, "error: no such field\n"),  # no launcher repeats it
    (TrainingError("not finite"), 2, "error: not finite\n"),
    (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
    (ImportError("Please install gcsfs"), 1, "error: Please install gcsfs\n"),  # a work directory on gs://
    (MemoryError(), 1, "error: MemoryError (too little memory: a smaller training.batch_size"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "error: RESOURCE_EXHAUSTED: 9 GiB (too little memory"),
    (KeyboardInterrupt("saved step 3"), 130, "error: saved step 3; run the same command again to resume\n"),
]


@pytest.mark.parametrize("raised, code, message", RAISED, ids=lambda x: type(x).__name__)
def test_what_a_binary_raises_is_one_line(raised, code, message, quiet, capsys, monkeypatch):
    def main():
        raise raised

    monkeypatch.setattr(sys, "argv", ["binary"])
    monkeypatch.setattr(os, "_exit", sys.exit)  # taken by 130, which must not wait for threads
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    error = capsys.readouterr().err
    assert stop.value.code == code and error.startswith(message) and error.count("\n") == 1


def test_stray_arguments(quiet, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["binary", "extra"])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: None)
    assert stop.value.code == 2 and "unexpected argument 'extra'" in capsys.readouterr().err


CONFIGS = [
    RunConfig(),
    RunConfig(model=LlamaConfig(qk_norm=True), training=LoopConfig(trainable=("a", "b"), ema=0.5)),
    FinetuneConfig(),
    FinetuneConfig(base="int8", lora=LoraConfig(targets=("head/kernel",), rs=True)),
    FinetuneConfig(lora=None),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_configs_survive_the_flags(config):
    values = cli.as_config_dict(config).lock()
    assert cli.from_config_dict(type(config), values) == config


def test_overrides_reach_the_config():
    overrides = ("training.steps=7", "model.hidden_dim=48", "optimizer.learning_rate=1", "data.tokenizer=x.json")
    overrides += ("optimizer.rates=('*/b=16', 'embed/*=0.5')", "optimizer.layer_decay=0.9")
    with binary("train", DEMO, *(f"--config.{o}" for o in overrides)) as module:
        config = cli.from_config_dict(RunConfig, module.CONFIG.value)
    plain = cli.from_config_dict(RunConfig, demo.get_config("tiny"))
    assert config == dataclasses.replace(
        plain,
        training=dataclasses.replace(plain.training, steps=7),
        model=dataclasses.replace(plain.model, hidden_dim=48),
        optimizer=dataclasses.replace(
            plain.optimizer, learning_rate=1.0, rates=("*/b=16", "embed/*=0.5"), layer_decay=0.9
        ),
        data=dataclasses.replace(plain.data, tokenizer="x.json"),
    )
    with pytest.raises(ValueError, match="variant 'x' is not one of lora, "):
        finetune_experiment.get_config("x")


def test_models_by_package_name(tmp_path, monkeypatch):
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "weights.gguf").write_bytes(b"")
    (tmp_path / "empty_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.find_model("some_model") == str(tmp_path / "some_model" / "weights.gguf")
    for name in ("empty_package", "no_such_package", "org/name", str(tmp_path), "a b"):
        assert cli.find_model(name) == name


def test_convert(folder, tmp_path, capsys):
    call("convert", f"--model={folder}", f"--out={tmp_path / 'out'}", "--dtype=bfloat16")
    before, after = interop.load(folder), interop.load(tmp_path / "out")
    for (path, a), (_, b) in zip(paths.flatten(before.params), paths.flatten(after.params), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b, err_msg=path)
    assert after.config == before.config and after.tokenizer.encode("abc") == before.tokenizer.encode("abc")
    assert f"{weights.count(before.params):,} parameters written to" in capsys.readouterr().out


def test_convert_to_a_work_directory_and_back(folder, tmp_path):
    call("convert", f"--model={folder}", f"--out={tmp_path / 'run'}", "--format=ours")
    call("convert", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'back'}")
    before, after = interop.load(folder), interop.load(tmp_path / "back")
    for (path, a), (_, b) in zip(paths.flatten(before.params), paths.flatten(after.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert after.config == before.config and after.tokenizer.encode("abc") == before.tokenizer.encode("abc")
    with pytest.raises(interop.InteropError, match="holds a run already"):
        call("convert", f"--model={folder}", f"--out={tmp_path / 'run'}", "--format=ours")


def test_evaluate_equals_a_direct_computation(folder, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    call("evaluate", f"--model={folder}", f"--source={folder}/text.txt", "--sequence_length=16", "--batch_size=3",
         f"--cache={tmp_path}", "--sentence=abc abd", "--next=ab", f"--json={out}")  # fmt: skip
    found, loaded = json.loads(out.read_text()), interop.load(folder)
    tokenizer = loaded.tokenizer

    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    rows = np.asarray([ids[i : i + 17] for i in range(0, len(ids) - 16, 16)])
    sentence = [tokenizer.eos_id, *tokenizer.encode("abc abd")]
    start = [tokenizer.eos_id, *tokenizer.encode("ab")]
    more = np.asarray([x + [0] * (16 - len(x)) for x in (sentence, start)])  # what stands behind does not matter
    forward = jax.jit(lambda params, ids: loaded.model.apply({"params": params}, ids).logits)
    logp = np.asarray(forward(loaded.params, np.concatenate([rows[:, :-1], more])), np.float64)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    labels, batch = rows[:, 1:], logp[:-2]
    loss = -np.take_along_axis(batch, labels[..., None], -1).mean()
    want = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/accuracy": (batch.argmax(-1) == labels).mean(),
        "eval/bits_per_byte": loss * len(ids) / len(TEXT.encode()) / math.log(2),
    }
    assert found.keys() == {*want, "sentences", "next"}
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)

    total = sum(logp[-2, np.arange(7), sentence[1:]])
    (entry,) = found["sentences"]
    assert entry["text"] == "abc abd" and entry["tokens"] == 7
    np.testing.assert_allclose(entry["log_probability"], total, rtol=1e-5)
    p = np.exp(logp[-1, len(start) - 1])
    (entry,) = found["next"]
    best = np.argsort(-p)[:10]
    assert [t for t, _ in entry["tokens"]] == [tokenizer.decode([i]) for i in best]
    np.testing.assert_allclose([q for _, q in entry["tokens"]], p[best], rtol=1e-5)
    printed = capsys.readouterr().out
    assert f"eval/loss {loss:.4f}" in printed and f"log p = {total:.3f} (7 tokens" in printed


def test_nothing_to_evaluate(folder):
    for arguments, message in [((), "nothing to do"), (("--sentence=",), "has too few tokens")]:
        with pytest.raises(ValueError, match=message):
            call("evaluate", f"--model={folder}", *arguments)


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_changed_data_is_accepted_when_asked_for(name, folder, tmp_path, monkeypatch):
    seen = []

    def train(*given, accept_changed_data, **more):
        seen.append(accept_changed_data)
        raise StopIteration

    monkeypatch.setattr(training.run, "train", train)
    monkeypatch.setattr(training.finetune, "train", train)
    config = (DEMO,) if name == "train" else (FINETUNE, f"--model={folder}")
    for flag in ([], ["--accept_changed_data"]):
        with pytest.raises(StopIteration):
            call(name, *config, f"--workdir={tmp_path}", *flag)
    assert seen == [False, True]


def test_finetune(folder, tmp_path, capsys):
    """The sizes are those of tests/training/test_finetune.py, so that the step is compiled once for both."""
    values = {
        "run.data.source": f"{folder}/text.txt", "run.data.split": "tail", "run.data.validation_share": 0.1,
        "run.training.steps": 2, "run.training.batch_size": 8, "run.training.sequence_length": 16,
        "run.training.log_every": 1, "run.optimizer.learning_rate": 0.02, "run.optimizer.schedule": "constant",
        "run.optimizer.warmup_steps": 0, "lora.rank": 3, "lora.alpha": 6.0,
    }  # fmt: skip
    call("finetune", FINETUNE, f"--model={folder}", f"--workdir={tmp_path}",
         *(f"--config.{k}={v}" for k, v in values.items()))  # fmt: skip
    printed = capsys.readouterr().out
    assert "trainable 5,568 bytes" in printed and "step 2, loss" in printed
    merged, adapted = interop.load(tmp_path / "merged"), interop.load(tmp_path)
    ids = np.asarray([merged.tokenizer.encode("abc abd")])
    run = jax.jit(lambda params: merged.model.apply({"params": params}, ids).logits)
    np.testing.assert_allclose(run(merged.params), run(adapted.params), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )


def test_xz_beside_the_results(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 50)
    assert report.xz_bits_per_byte(str(tmp_path), 0.0) is None
    whole = "".join(f"{i} " * 50 for i in range(9)).encode()
    want = 8 * len(lzma.compress(whole, preset=9)) / len(whole)
    assert math.isclose(report.xz_bits_per_byte(str(tmp_path), 1.0), want)
