"""Trains one model with each encoding of positions, and measures each up to several times the trained length.

python -m experiments.positions --workdir=runs/positions
python -m experiments.positions --workdir=runs/positions --kinds=rotary,alibi --config.training.steps=1000

Every encoding has a run in WORKDIR/KIND, which resumes like any; then all take turns at the gradient of one batch, for
their speed. The table is printed and written to WORKDIR/positions.json, the loss at every distance from a row's
beginning drawn in WORKDIR/positions.png.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack

CONFIG = cli.define_config("experiments/configs/positions.py", "Experiment file; its model's positions are replaced.")
WORKDIR = flags.DEFINE_string("workdir", "runs/positions", "Folder of the runs.")
KINDS = flags.DEFINE_list(
    "kinds", "learned,sinusoidal,shaw,t5,xlnet,deberta,alibi,rotary,none", "Encodings, of models.gpt.POSITIONS."
)
FACTOR = flags.DEFINE_integer("factor", 4, "Longest row measured, in trained lengths.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 64, "Held-out rows of that length.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 20, "Gradients of each, for the speed.", lower_bound=1)


def loss_by_position(trained: Any, config: Any, rows: np.ndarray) -> np.ndarray:
    """Mean loss, in nats, of the token at each position of `rows` `[R, T + 1]`, as far as the positions go."""
    from llm_jax.decoding.score import sequence_logprobs

    length = rows.shape[1] - 1
    if config.model.positions == "learned":
        length = config.model.context_length
    model = dataclasses.replace(config.model, context_length=length).make()
    total = np.zeros(length)
    for start in range(0, len(rows), 8):
        ids = rows[start : start + 8, : length + 1]
        total -= np.asarray(sequence_logprobs(model, trained.params, ids, np.ones_like(ids))).sum(0)
    return total / len(rows)


def speeds(configs: dict[str, Any], batch: np.ndarray) -> dict[str, float]:
    """Tokens a second through the gradient of the loss on `batch` `[B, T + 1]`: medians of turns."""
    from llm_jax.objectives.causal_lm import CausalLM
    from llm_jax.objectives.objective import total_loss

    runs = {}
    for kind, config in configs.items():
        model, objective = config.make(), CausalLM().for_run(1, config, None)

        def loss(params, key, model=model, objective=objective):
            prepared = objective.prepare({"input_ids": batch}, key)
            out = model.apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        key = jax.random.key(0)
        params = unstack(weights.split_axes(jax.jit(model.init)(key, batch[:1, :-1])["params"])[0])
        runs[kind] = functools.partial(jax.jit(jax.grad(loss)), params, key)
        jax.block_until_ready(runs[kind]())
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(TURNS.value):
        for kind, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[kind].append(time.perf_counter() - began)
    return {kind: batch[:, 1:].size / statistics.median(times) for kind, times in seconds.items()}


def plot(losses: dict[str, np.ndarray], trained_length: int, path: pathlib.Path) -> None:
    """Draws the losses, averaged over an eighth of the trained length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    width, inside = max(trained_length // 8, 1), []
    for kind, loss in losses.items():
        whole = loss[: len(loss) // width * width].reshape(-1, width).mean(1)
        inside += whole[: trained_length // width].tolist()
        axes.plot((np.arange(len(whole)) + 0.5) * width, whole, label=kind, marker=".")
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="position in the row, tokens (dashed: the trained length)", ylabel="nats a token")
    axes.set_ylim(0.95 * min(inside), 1.15 * max(inside))  # what fails far out leaves the picture
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, which fill the picture
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Trains, measures, prints, draws."""
    from llm_jax.data import tokens
    from llm_jax.data.rows import packing
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    folder, length = pathlib.Path(WORKDIR.value), config.training.sequence_length
    data = dataclasses.replace(config.data, cache=str(folder / "tokens"))
    table: list[dict[str, Any]] = []
    losses, tokenizer = {}, None
    for kind in KINDS.value:
        own = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, positions=kind))
        trained = run.train(own, folder / kind, tokenizer=tokenizer)
        tokenizer = trained.tokenizer
        store = tokens.build(data.source, tokenizer, data.cache, data.validation_share)["validation"]
        found = packing.StreamRows(store, FACTOR.value * length)
        chosen = np.linspace(0, len(found) - 1, min(ROWS.value, len(found))).astype(int)
        rows = np.stack([found[i]["input_ids"] for i in chosen])
        losses[kind] = loss = loss_by_position(trained, own, rows)
        beyond = {f"{n}x": float(loss[(n - 1) * length : n * length].mean()) for n in range(2, len(loss) // length + 1)}
        inside = {"held_out": trained.evaluation["eval/loss"], "1x": float(loss[:length].mean())}
        table.append({"positions": kind, **inside, **beyond})
    batch = rows[: config.training.batch_size, : length + 1]
    models = {kind: dataclasses.replace(config.model, positions=kind) for kind in losses}
    for row, speed in zip(table, speeds(models, batch).values(), strict=True):
        row["gradient_tokens_per_second"] = speed
    (folder / "positions.json").write_text(json.dumps(table, indent=2) + "\n")
    plot(losses, length, folder / "positions.png")
    names = ["positions", "held_out", *(f"{n}x" for n in range(1, FACTOR.value + 1)), "gradient_tokens_per_second"]
    show = lambda x: "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if x > 100 else f"{x:.3f}"
    print("nats a token on held-out text; n x: behind n - 1 and up to n trained lengths")
    for line in (names, *([show(row.get(n)) for n in names] for row in table)):
        print("  ".join(cell.ljust(17) for cell in line).rstrip())
    print(f"drawn in {folder / 'positions.png'}")


if __name__ == "__main__":
    cli.run(main)
