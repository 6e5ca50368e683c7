"""A delta run of two processes: killed, resumed, exported; against one process that was never interrupted."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import borrowed
import numpy as np
import pytest

from llm_jax import interop
from llm_jax.delta import methods
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.methods import DeltaConfig
from llm_jax.interop import peft
from llm_jax.storage.checkpoints import Checkpoints

jobs = borrowed.module("parity/test_processes.py")
folder = borrowed.module("training/test_delta_checkpoints.py").folder
CONFIG = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs" / "finetune.py"
STEPS = 4


def command(folder, workdir, steps, *flags):
    values = {"lora.rank": 2, "lora.dora": True, "base": "int8", "run.data.source": folder / "text.txt",
              "run.training.steps": steps, "run.training.batch_size": 8, "run.training.sequence_length": 16,
              "run.training.checkpoint_every": 1, "run.training.log_every": 1,
              "run.optimizer.schedule": "constant"}  # fmt: skip
    return [
        *(sys.executable, "-m", "experiments.finetune", f"--config={CONFIG}", f"--model={folder}"),
        *(f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items()), *flags),
    ]


def finished(count, *args):
    job = jobs.start_command(count, command(*args))
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    return said


def test_a_killed_delta_run_resumes_and_is_exported(folder, tmp_path, monkeypatch):
    """ZeRO-3 over two processes: no array of theirs is whole anywhere, and files are written once."""
    monkeypatch.setenv("JAX_HEARTBEAT_TIMEOUT", "10")
    zero = "--config.run.plan.zero=3"
    finished(1, folder, tmp_path / "one", STEPS)
    job = jobs.start_command(2, command(folder, tmp_path / "two", 100000, zero))
    saved = lambda: Checkpoints(tmp_path / "two" / "checkpoints", read_only=True).steps()
    while job.poll() is None and not ((tmp_path / "two" / "checkpoints").exists() and saved()):
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = job.communicate(timeout=120)[0]
    assert job.returncode not in (0, 130), said
    said = finished(2, folder, tmp_path / "two", max(saved()) + STEPS, zero)
    assert "resuming from step" in said
    losses = jobs.losses(tmp_path / "two")
    for step, loss in jobs.losses(tmp_path / "one").items():
        assert losses[step] == pytest.approx(loss, rel=1e-4), step
    ids = np.arange(12)[None] % 5
    run = interop.load(tmp_path / "two")
    want = run.model.apply({"params": run.params}, ids).logits
    merged = interop.load(tmp_path / "two" / "merged")
    np.testing.assert_allclose(merged.model.apply({"params": merged.params}, ids).logits, want, rtol=1e-4, atol=1e-4)
    base = methods.quantized(interop.load(folder).params, DeltaConfig(lora=LoraConfig()))
    adapted = peft.load(tmp_path / "two" / "adapter", run.model, base)
    np.testing.assert_allclose(run.model.apply({"params": adapted}, ids).logits, want, rtol=1e-4, atol=1e-4)
