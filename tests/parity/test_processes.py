"""Two processes of one job, as `launch/local.sh` starts them, against one process on the same data."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import borrowed
import pytest

from llm_jax.parallel.plan import PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import metrics, run
from llm_jax.training.loop import Interrupted
from llm_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
corpus = borrowed.module("training/conftest.py").corpus
STEPS = 6


def command(source, workdir, *flags, config="demo"):
    sizes = dict(vocab_size=300, context_length=16, model_dim=16, num_layers=2, num_heads=2)
    training = dict(steps=STEPS, batch_size=8, sequence_length=16, log_every=1, eval_every=STEPS, checkpoint_every=4)
    return [
        *(sys.executable, "-m", "experiments.train", f"--config={ROOT}/experiments/configs/{config}.py"),
        *(f"--config.data.source={source}", "--config.data.validation_share=0.2", f"--workdir={workdir}"),
        *(f"--config.model.{k}={v}" for k, v in sizes.items()),
        *(f"--config.training.{k}={v}" for k, v in training.items()),
        *flags,
    ]


def start(count, *args, **kwargs):
    return start_command(count, command(*args, **kwargs))


def start_command(count, words):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [str(ROOT / "launch" / "local.sh"), str(count), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r}


def wait(job, workdir):
    """Until as many steps are logged."""
    while len(losses(workdir) if (workdir / "metrics.jsonl").exists() else ()) < STEPS and job.poll() is None:
        time.sleep(0.05)


def test_two_processes_are_one_run(corpus, tmp_path, monkeypatch):
    """The same losses as of a run in one process; a signal to one of them ends both, with what was learned."""
    two = tmp_path / "two"
    # a token cache of their own, which one of them fills while the other waits
    endless = "--config.training.steps=100000"
    job = start(2, corpus, two, endless, "--config.plan.zero=2", f"--config.data.cache={tmp_path}/cache")
    wait(job, two)
    pids = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(pids[-1]), signal.SIGTERM)  # one of them; the other hears of it
    said = job.communicate(timeout=300)[0]
    assert said.count("interrupted: saved step") == 2, said
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1 and not (two / "tokens").exists()
    (saved,) = Checkpoints(two / "checkpoints", read_only=True).steps()[-1:]
    assert f"interrupted: saved step {saved} of 100000" in said and saved >= STEPS

    write = metrics.MetricsWriter.write

    def write_and_stop(writer, step, values):
        write(writer, step, values)
        if step == STEPS and "train/loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsWriter, "write", write_and_stop)
    config, one = run.load_config(two), tmp_path / "one"
    alone = dataclasses.replace(config, plan=PlanConfig(), data=dataclasses.replace(config.data, cache=None))
    with pytest.raises(Interrupted, match=f"interrupted: saved step {STEPS} of 100000"):
        run.train(alone, one)
    for step in range(1, STEPS + 1):
        assert losses(two)[step] == pytest.approx(losses(one)[step], rel=1e-4), step
