"""Models that differ in their encoding of positions: loss by position, speed, and a picture of the first."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from llm_jax.decoding.score import sequence_logprobs
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import unstack
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.objective import total_loss


def loss_by_position(config: GPTConfig, params: Params, rows: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Mean loss, in nats, of the token at each position, as far as the positions go.

    Args:
      config: of the model; its context is taken as long as the rows, but for learned positions, which end.
      params: of the model.
      rows: token ids, `[R, T + 1]`.
      batch_size: rows at once.
    """
    length = config.context_length if config.positions == "learned" else rows.shape[1] - 1
    model = dataclasses.replace(config, context_length=length).make()
    total = np.zeros(length)
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size, : length + 1]
        total -= np.asarray(sequence_logprobs(model, params, ids, np.ones_like(ids))).sum(0)
    return total / len(rows)


def gradient_speeds(configs: Mapping[str, GPTConfig], batch: np.ndarray, turns: int) -> dict[str, float]:
    """Tokens a second through the gradient of the loss on `batch` `[B, T + 1]`: medians of alternating turns."""
    runs = {}
    for name, config in configs.items():
        model, objective = config.make(), CausalLM().for_run(1, config, None)

        def loss(params, key, model=model, objective=objective):
            prepared = objective.prepare({"input_ids": batch}, key)
            out = model.apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        key = jax.random.key(0)
        params = unstack(weights.split_axes(jax.jit(model.init)(key, batch[:1, :-1])["params"])[0])
        runs[name] = functools.partial(jax.jit(jax.grad(loss)), params, key)
        jax.block_until_ready(runs[name]())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return {name: batch[:, 1:].size / statistics.median(times) for name, times in seconds.items()}


def plot(losses: Mapping[str, np.ndarray], trained_length: int, path: epath.PathLike) -> None:
    """Draws the losses by position, averaged over an eighth of the trained length."""
    from matplotlib.figure import Figure  # no backend is chosen for the process, which may be a notebook's

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    width, inside = max(trained_length // 8, 1), []
    for name, loss in losses.items():
        means = loss[: len(loss) // width * width].reshape(-1, width).mean(1)
        inside += means[: trained_length // width].tolist()
        axes.plot((np.arange(len(means)) + 0.5) * width, means, label=name, marker=".")
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="position in the row, tokens (dashed: the trained length)", ylabel="nats a token")
    axes.set_ylim(0.95 * min(inside), 1.15 * max(inside))  # what fails far out leaves the picture
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, which fill the picture
    figure.tight_layout()
    figure.savefig(path, dpi=120)
