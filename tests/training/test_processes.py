"""Two processes of one job, as `launch/local.sh` starts them, against one process on the same data."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 6


def command(source, workdir, *flags):
    sizes = dict(vocab_size=300, context_length=16, model_dim=16, num_layers=2, num_heads=2)
    training = dict(steps=STEPS, batch_size=8, sequence_length=16, log_every=1, eval_every=STEPS, checkpoint_every=4)
    return [
        *(sys.executable, "-m", "experiments.train", f"--config={ROOT}/experiments/configs/demo.py"),
        *(f"--config.data.source={source}", "--config.data.validation_share=0.2", f"--workdir={workdir}"),
        *(f"--config.model.{k}={v}" for k, v in sizes.items()),
        *(f"--config.training.{k}={v}" for k, v in training.items()),
        *flags,
    ]


def start(count, *args):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PORT": str(port), "JAX_PLATFORMS": "cpu"}
    launch = [str(ROOT / "launch" / "local.sh"), str(count)] if count > 1 else []
    return subprocess.Popen(
        [*launch, *command(*args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_metrics(workdir) if "train/loss" in r}


def test_two_processes_are_one_run(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(1, corpus, one)
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said
    job = start(2, corpus, two, "--config.plan.zero=2")
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert losses(two).keys() == losses(one).keys() == set(range(1, STEPS + 1))
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-4), step

    stopped = tmp_path / "stopped"
    job = start(2, corpus, stopped, "--config.plan.zero=2", "--config.training.steps=100000")
    while not losses(stopped) if (stopped / "metrics.jsonl").exists() else job.poll() is None:
        time.sleep(0.05)
    pids = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(pids[-1]), signal.SIGTERM)  # one of them; the other hears of it
    said = job.communicate(timeout=300)[0]
    assert said.count("interrupted: saved step") == 2, said
    (saved,) = Checkpoints(stopped / "checkpoints", read_only=True).steps()[-1:]
    assert f"interrupted: saved step {saved} of 100000" in said
