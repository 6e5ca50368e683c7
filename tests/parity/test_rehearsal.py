"""The TPU compiler on a machine without a TPU: what `rehearse` reads of a small model on 16 chips."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="rehearsals need libtpu: pip install .[rehearse]")
ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [f"--config.model.{x}" for x in ("num_layers=4", "model_dim=512", "num_heads=4", "num_kv_heads=4")]
SMALL += ["--config.model.hidden_dim=1024", "--config.model.vocab_size=4096", "--config.training.sequence_length=512"]


def rehearse(tmp_path, *flags):
    out = tmp_path / "report.json"
    config = f"--config={ROOT / 'experiments/configs/llama2_7b.py'}"
    command = [sys.executable, "-m", "experiments.rehearse", "--topology=v5e:4x4", config, *SMALL, f"--json={out}"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}
    )
    return done, json.loads(out.read_text()) if out.exists() else None


def test_zero_3(tmp_path):
    done, r = rehearse(tmp_path, "--config.training.batch_size=16")
    assert done.returncode == 0, done.stderr
    p = 2 * 4096 * 512 + 4 * (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512) + 512
    assert r["parameters"] == p and r["mesh"] == {"data": 16} and r["fits"]
    assert r["held"]["parameters"] == 4 * p / 16
    assert 8 * p / 16 <= r["held"]["optimizer"] <= 8 * p / 16 + 64  # and counters
    assert r["memory"]["arguments"] >= 12 * p / 16
    moved = {}
    for row in r["collectives"]:
        assert row["axes"] in ("data", ""), row
        moved[row["kind"]] = moved.get(row["kind"], 0) + row["sent"]
    # bfloat16 kernels are gathered for the forward and again for the recomputing backward, by gathers or by windows of
    # permutations; gradients are summed once
    assert sum(moved.values()) >= 3 * 2 * (p - 4096 * 512) * 15 / 16
    layers = p - 2 * 4096 * 512 - 512
    assert moved["reduce-scatter"] >= 2 * (layers - 4 * 2 * 512) * 15 / 16  # written out, they stay what they are
    assert moved["all-reduce"] <= 2 * 2 * (2 * 4096 * 512 + 4 * 2 * 512 + 2 * 512)
    assert 0 < r["mfu"] <= r["mfu_bound"] < 1 and 0 <= r["hidden"] <= 1
    assert "a chip holds parameters" in done.stdout and "predicted step" in done.stdout


def test_layers_in_host_memory(tmp_path):
    """The device holds what is outside of layers, and vectors; matrices of layers and all state lie on the host."""
    flags = ["--config.plan.explicit=False", "--config.plan.master=in_optimizer", "--config.training.batch_size=16"]
    done, r = rehearse(tmp_path, *flags, "--config.plan.offload=('update', 'parameters')")
    assert done.returncode == 0, done.stderr
    layers, outside = 4 * (4 * 512 * 512 + 3 * 512 * 1024), 2 * 4096 * 512 + (4 * 2 + 1) * 512
    assert r["memory"]["arguments"] == pytest.approx(2 * outside / 16, rel=0.1)
    assert r["memory"]["host"] >= (2 * layers + 12 * (layers + outside)) / 16
    assert "of host memory" in done.stdout


def test_a_pipeline(tmp_path):
    flags = ["--config.plan.pipe=4", "--config.plan.data=4", "--config.training.batch_size=32"]
    flags += ["--config.plan.explicit=False"]
    done, r = rehearse(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    # 8 micro-batches of a row a group: an activation and a gradient of 512 x 512 bfloat16 each way a tick
    ticks = 2 * (8 + 3)
    permuted = [row for row in r["collectives"] if (row["kind"], row["axes"]) == ("collective-permute", "pipe")]
    sent = sum(row["bytes"] for row in permuted)
    assert sent == pytest.approx(2 * ticks * 512 * 512 * 2, rel=0.1)


def test_a_token_for_every_row(tmp_path):
    flags = ["--step=decode", "--config.plan.model=4", "--config.plan.data=4", "--config.plan.explicit=False"]
    done, r = rehearse(tmp_path, *flags, "--config.training.batch_size=16")
    assert done.returncode == 0, done.stderr
    layers = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert r["held"]["parameters"] == 2 * ((2 * 4096 * 512 + layers) // 4 + 9 * 512)  # norms are whole
    assert r["held"]["cache"] == 2 * 4 * 4 * (512 * 512 // 4) * 2 + 4 * 4  # keys, values; and lengths
    summed = [row for row in r["collectives"] if (row["kind"], row["axes"]) == ("all-reduce", "model")]
    assert sum(row["calls"] for row in summed) == 2 * 4 + 1  # two a layer, and the rows of the token table
    assert sum(row["bytes"] for row in summed) == pytest.approx(9 * 4 * 512 * 2, rel=0.01)
    assert r["tokens_per_step"] == 16 and 0 < r["reading_seconds"] < r["step_seconds"]
    assert "to read weights and cache once takes" in done.stdout


def test_nothing_is_served_along_a_pipeline(tmp_path):
    done, _ = rehearse(tmp_path, "--step=prefill", "--config.plan.pipe=4", "--config.plan.explicit=False")
    assert done.returncode == 1 and "serves along data and model: leave plan.pipe" in done.stderr


def test_a_compiler_that_is_killed_ends_in_a_line():
    dies = "from experiments import rehearse; rehearse.apart(); import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", dies], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the compiler was killed (SIGKILL)") and done.stderr.count("\n") == 1


def test_an_unknown_topology(tmp_path):
    done, _ = rehearse(tmp_path, "--topology=v5p-128")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: topology='v5p-128' is none")


def test_what_policies_keep(tmp_path):
    done, _ = rehearse(tmp_path, "--policies", "--config.training.batch_size=16")
    assert done.returncode == 0, done.stderr
    kept = {name: tuple(map(float, rest)) for name, *rest in map(str.split, done.stdout.splitlines()[1:])}
    assert kept["none"] > kept["dots"] > kept["names:attention,mlp"] > kept["full"]
    state = 512 * 512 * 2 / 1e9  # a row a chip, of one layer, in bfloat16
    assert kept["offload:block"][1] == pytest.approx(4 * state, abs=1e-3) and kept["full"][1] == 0
