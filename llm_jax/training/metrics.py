"""Numbers of a run: JSON lines, TensorBoard events, the loss plot."""

import json
import math
from typing import Any

import jax
from etils import epath

from llm_jax.objectives.objective import NATS_PER_TOKEN


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard; only the first process writes."""

    def __init__(self, workdir: epath.PathLike, first_step: int) -> None:
        """Lines after `first_step`, left by a run that was killed after its last checkpoint, are dropped."""
        self.file = epath.Path(workdir) / "metrics.jsonl"
        self.active = jax.process_index() == 0
        if not self.active:
            return
        self.text = "".join(json.dumps(r) + "\n" for r in read_metrics(workdir) if r["step"] <= first_step)
        self.file.write_text(self.text)
        import tensorboardX  # it imports torch where that is installed

        self._board = tensorboardX.SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; values that are not finite are written as null."""
        if not self.active:
            return
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        line = json.dumps({"step": step, **clean}) + "\n"
        if "://" in str(self.file):  # object stores append nothing to a file
            self.text += line
            self.file.write_text(self.text)
        else:
            with self.file.open("a") as f:
                f.write(line)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the event file."""
        if self.active:
            self._board.close()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All complete lines of `metrics.jsonl`, each with its `step`."""
    file = epath.Path(workdir) / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def plot_loss(workdir: epath.PathLike, unit: str = NATS_PER_TOKEN) -> epath.Path:
    """Draws training and held-out loss, in `unit`, against the step into `loss.png`."""
    from matplotlib.figure import Figure

    rows = read_metrics(workdir)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style, label in (("train/loss", "-", "training"), ("eval/loss", "o-", "held out")):
        points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    baselines = [r["eval/baseline_loss"] for r in rows if r.get("eval/baseline_loss") is not None]
    if baselines:  # what token frequencies alone give, and a coin where there are pairs
        axes.axhline(baselines[-1], linestyle="--", linewidth=1, color="gray", label="without context")
    axes.set(xlabel="step", ylabel=unit, title=epath.Path(workdir).name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = epath.Path(workdir) / "loss.png"
    with path.open("wb") as f:
        figure.savefig(f, format="png", dpi=120)
    return path
