"""The binary that compares encodings of positions, on a tiny run."""

import json
import pathlib

import numpy as np
from binaries import call

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = dict(vocab_size=300, context_length=16, model_dim=16, num_layers=1, num_heads=2)
STEPS = dict(steps=2, batch_size=8, sequence_length=16, eval_every=2, eval_batches=1, checkpoint_every=2, log_every=1)


def test_learned_positions_end_and_others_go_on(tmp_path, capsys, one_device):
    words = np.random.default_rng(0).choice(
        ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more"], (20, 300)
    )
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(words):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(row))
    sizes = [f"--config.model.{k}={v}" for k, v in SIZES.items()] + [
        f"--config.training.{k}={v}" for k, v in STEPS.items()
    ]
    fast = ["--config.optimizer.name=adam", "--config.optimizer.weight_decay=0.0"]  # quicker to compile than Muon
    data = ["--config.data.validation_share=0.3", f"--config.data.source={tmp_path / 'texts'}"]
    config = f"--config={ROOT}/experiments/configs/positions.py"
    call(
        "positions",
        config,
        *sizes,
        *data,
        *fast,
        f"--workdir={tmp_path / 'runs'}",
        "--kinds=learned,alibi",
        "--factor=3",
        "--turns=1",
        "--rows=4",
    )
    learned, alibi = json.loads((tmp_path / "runs" / "positions.json").read_text())
    assert set(learned) == {"positions", "gradient_tokens_per_second", "held_out", "1x"}
    assert set(alibi) == {*learned, "2x", "3x"} and alibi["positions"] == "alibi"
    assert all(np.isfinite(v) and v > 0 for row in (learned, alibi) for k, v in row.items() if k != "positions")
    assert (tmp_path / "runs" / "positions.png").stat().st_size > 5000
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["learned", *printed[-3][1:3], "-", "-", printed[-3][-1]] == printed[-3] and printed[-2][0] == "alibi"
