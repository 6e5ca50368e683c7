"""Trains one model with each encoding of positions, and measures each up to several times the trained length.

python -m experiments.positions --workdir=runs/positions
python -m experiments.positions --workdir=runs/positions --kinds=rotary,alibi --config.training.steps=1000

Every encoding has a run in WORKDIR/KIND, which resumes like any; then all take turns at the gradient of one batch, for
their speed. The table is printed and written to WORKDIR/positions.json, the loss at every distance from a row's
beginning is drawn in WORKDIR/positions.png.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/positions.py", "Experiment file; its model's positions are replaced.")
WORKDIR = flags.DEFINE_string("workdir", "runs/positions", "Folder of the runs.")
KINDS = flags.DEFINE_list(
    "kinds", "learned,sinusoidal,shaw,t5,xlnet,deberta,alibi,rotary,none", "Encodings, of models.gpt.POSITIONS."
)
FACTOR = flags.DEFINE_integer("factor", 4, "Longest row measured, in trained lengths.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 64, "Held-out rows of that length.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 20, "Gradients of each, for the speed.", lower_bound=1)


def _show(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value > 100 else f"{value:.3f}"


def main() -> None:
    """Trains, measures, prints, draws."""
    from llm_jax.data import tokens
    from llm_jax.data.rows import packing
    from llm_jax.tasks import position_encodings
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    folder, length = pathlib.Path(WORKDIR.value), config.training.sequence_length
    data = dataclasses.replace(config.data, cache=str(folder / "tokens"))
    table: list[dict[str, Any]] = []
    losses, tokenizer = {}, None
    for kind in KINDS.value:
        model = dataclasses.replace(config.model, positions=kind)
        kind_config = dataclasses.replace(config, data=data, model=model)
        trained = run.train(kind_config, folder / kind, tokenizer=tokenizer)
        tokenizer = trained.tokenizer
        store = tokens.build(data.source, tokenizer, data.cache, data.validation_share)["validation"]
        held_out = packing.StreamRows(store, FACTOR.value * length)
        chosen = np.linspace(0, len(held_out) - 1, min(ROWS.value, len(held_out))).astype(int)
        rows = np.stack([held_out[i]["input_ids"] for i in chosen])
        losses[kind] = loss = position_encodings.loss_by_position(model, trained.params, rows)
        beyond = {f"{n}x": float(loss[(n - 1) * length : n * length].mean()) for n in range(2, len(loss) // length + 1)}
        inside = {"held_out": trained.evaluation["eval/loss"], "1x": float(loss[:length].mean())}
        table.append({"positions": kind, **inside, **beyond})
    batch = rows[: config.training.batch_size, : length + 1]
    models = {kind: dataclasses.replace(config.model, positions=kind) for kind in losses}
    speeds = position_encodings.gradient_speeds(models, batch, TURNS.value)
    for row, speed in zip(table, speeds.values(), strict=True):
        row["gradient_tokens_per_second"] = speed
    (folder / "positions.json").write_text(json.dumps(table, indent=2) + "\n")
    position_encodings.plot(losses, length, folder / "positions.png")
    names = ["positions", "held_out", *(f"{n}x" for n in range(1, FACTOR.value + 1)), "gradient_tokens_per_second"]
    print("nats a token on held-out text; n x: behind n - 1 and up to n trained lengths")
    for line in (names, *([_show(row.get(n)) for n in names] for row in table)):
        print("  ".join(cell.ljust(17) for cell in line).rstrip())
    print(f"drawn in {folder / 'positions.png'}")


if __name__ == "__main__":
    cli.run(main)
