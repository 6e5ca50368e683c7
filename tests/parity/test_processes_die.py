"""Jobs of several processes: where one dies the others end and say why; others resume, with what rows remember."""

import os
import shutil
import signal
import subprocess
import time

import borrowed
import pytest

jobs, corpus = borrowed.module("parity/test_processes.py"), borrowed.module("training/conftest.py").corpus
FLAGS = ("--config.optimizer.schedule=constant", "--config.training.checkpoint_every=1", "--samples=0")


def test_the_others_end_and_others_resume(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_HEARTBEAT_TIMEOUT", "10")
    killed = tmp_path / "killed"
    job = jobs.start(2, corpus, killed, "--config.plan.zero=2", "--config.training.steps=100000", *FLAGS)
    names = lambda: [int(p.name) for p in (killed / "checkpoints").glob("*") if p.name.isdigit()]
    saved = lambda: sorted(names())
    while job.poll() is None and not (saved() and saved()[-1] >= 3):
        time.sleep(0.05)
    pids = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    begin = time.monotonic()
    os.kill(int(pids[-1]), signal.SIGKILL)
    said = job.communicate(timeout=120)[0]
    assert job.returncode not in (0, 130), said
    assert time.monotonic() - begin < 60
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "another process" in errors[0], said

    step = saved()[-1]
    before = jobs.losses(killed)
    for count, plan in {1: "--config.plan.zero=0", 4: "--config.plan.zero=3"}.items():
        workdir = tmp_path / f"resumed on {count}"
        shutil.copytree(killed, workdir)
        job = jobs.start(count, corpus, workdir, plan, f"--config.training.steps={step + 3}", *FLAGS)
        said = job.communicate(timeout=300)[0]
        assert job.returncode == 0 and f"resuming from step {step}" in said, said
    one, four = (jobs.losses(tmp_path / f"resumed on {count}") for count in (1, 4))
    assert set(one) == set(four) and max(one) == step + 3
    for at in range(1, step + 4):
        assert four[at] == pytest.approx(one[at], rel=1e-4), at
        assert at > step or one[at] == before[at]


SIZES = dict(num_heads=2, hidden_dim=16, memory_length=8, reuse_length=8)
XLNET = [
    *(f"--config.model.{k}={v}" for k, v in SIZES.items()),
    *("--config.optimizer.name=adamw", "--config.optimizer.learning_rate=0.01", "--config.optimizer.schedule=constant"),
    *("--config.plan.unroll=false", "--config.data.tokenizer_kind=bpe", "--samples=0"),
]


def test_what_rows_remember_is_read_on_by_other_processes(corpus, tmp_path):
    """XLNet's memories, half of its rows backwards: saved by one process, resumed by two."""

    def run(count, folder, steps):
        job = jobs.start(count, corpus, tmp_path / folder, *XLNET, f"--config.training.steps={steps}", config="xlnet")
        said = job.communicate(timeout=300)[0]
        assert job.returncode == 0, said

    run(1, "whole", jobs.STEPS)
    run(1, "parts", 3)
    run(2, "parts", jobs.STEPS)
    whole, parts = (jobs.losses(tmp_path / name) for name in ("whole", "parts"))
    assert sorted(parts) == list(range(1, jobs.STEPS + 1))
    for step, loss in whole.items():
        assert parts[step] == pytest.approx(loss, rel=1e-5), step
