"""The training loop: steps, progress, evaluation, checkpoints, signals.

Everything here is host-side; what is computed lives in `step.py`.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.metrics import MetricsWriter
from llm_jax.training.state import TrainState


class TrainingError(RuntimeError):
    """Training cannot continue, and would fail again when resumed (hence the exit code); what was learned is saved."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state was saved."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what.

    Attributes:
      steps: optimizer steps of the whole run.
      batch_size: rows per step, over all devices.
      sequence_length: T, tokens predicted a row; of labelled examples the tokens of a row.
      accumulation: micro-batches a step.
      seed: of initialisation, data order and dropout.
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      eval_batches: batches per evaluation; 0 takes all.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      keep_last: newest checkpoints kept.
      keep_best: best checkpoints (lowest eval/loss) kept beside them.
      max_bad_steps: consecutive non-finite steps before the run stops.
      ema: decay of the moving average, 0 for none.
      trainable: patterns of what trains; None trains everything.
      profile_start: first step of the profiler window, 0 for none.
      profile_steps: its length.
    """

    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: int = 0
    max_bad_steps: int = 10
    ema: float = 0.0
    trainable: tuple[str, ...] | None = None
    profile_start: int = 0
    profile_steps: int = 5

    def __post_init__(self) -> None:
        """Checks ranges."""
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "accumulation",
            "log_every",
            "checkpoint_every",
            "keep_last",
            "max_bad_steps",
            "profile_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1)")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying; a second one kills at once."""
    got: list[int] = []

    def note(number: int, _: Any) -> None:
        if got:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        got.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook server): leave signals alone
        yield got
        return
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(stop: bool) -> bool:
    """True in every process of the job as soon as one of them was asked to stop: saving is a joint act."""
    if jax.process_count() == 1:
        return stop
    return bool(multihost_utils.process_allgather(np.asarray(stop)).any())


def _settle(checkpoints: Checkpoints) -> None:
    """Until no process of the job writes any more, in a way that fails at once where one of them has died.

    Orbax would wait at a barrier for the dead one, until its missing heartbeats end this process without a word.
    """
    while jax.process_count() > 1 and _agreed(checkpoints.saving()):
        pass


def run_loop(
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    loader: Any,
    put: Callable[[Any], Any],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    config: LoopConfig,
    evaluate: Callable[[TrainState], dict[str, float]],
    run_info: dict[str, Any],
    flops_per_step: float = 0.0,
    peak_flops: float | None = None,
    workdir: epath.PathLike = ".",
) -> tuple[TrainState, dict[str, float]]:
    """Runs from the state's step to `config.steps`.

    Args:
      state: where to start.
      step_fn: jitted step, donates the state.
      loader: batches, with `state()`.
      put: places a batch on the devices.
      checkpoints: where to save.
      writer: where numbers go.
      config: how long and how often.
      evaluate: numbers for the current state.
      run_info: saved with every checkpoint.
      flops_per_step: model FLOPs of all devices together, for model FLOP/s.
      peak_flops: of all devices together; adds `train/mfu`, model FLOPs over peak.
      workdir: profiles go here.

    Returns:
      (last state, numbers of the last evaluation).

    Raises:
      TrainingError: after `max_bad_steps` consecutive non-finite steps; the last good state is saved.
      Interrupted: on SIGINT or SIGTERM; the state is saved.
    """
    start = int(state.step)
    last_eval: dict[str, float] = {}
    evaluated = -1
    clock, tokens, steps = 0.0, 0.0, 0
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds between redraws; a log file gets few lines
    bar = tqdm(
        total=config.steps, initial=start, unit="step", mininterval=every, dynamic_ncols=True,
        disable=jax.process_index() != 0,
    )  # fmt: skip

    def save(step: int) -> None:
        _settle(checkpoints)
        metrics = last_eval if evaluated == step and last_eval else None  # keep_best ranks what was measured here
        checkpoints.save(step, state, {**run_info, "data": loader.state()}, metrics)

    @contextlib.contextmanager
    def untimed() -> Iterator[None]:
        nonlocal clock
        began = time.perf_counter()
        yield
        clock += time.perf_counter() - began if clock else 0.0

    def log(step: int, metrics: dict[str, Any]) -> None:
        nonlocal clock, tokens, steps
        values = {f"train/{k}": float(v) for k, v in metrics.items() if k != "bad_steps"}
        shown = ""
        if clock and time.perf_counter() > clock:
            seconds = time.perf_counter() - clock
            shown = f", {tokens / seconds:,.0f} tokens/s"
            values["train/tokens_per_second"] = tokens / seconds
            values["train/model_flops_per_second"] = steps * flops_per_step / seconds
            if peak_flops:
                values["train/mfu"] = values["train/model_flops_per_second"] / peak_flops
        bar.set_postfix_str(f"loss {values['train/loss']:.3f}{shown}", refresh=False)
        writer.write(step, values)
        clock, tokens, steps = time.perf_counter(), 0.0, 0

    with _stop_signals() as stop, bar:
        saved, stopping = start if start else -1, False
        profiling = False
        for step in range(start + 1, config.steps + 1):
            if step == config.profile_start:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # it hooks into every thread, and those of checkpoints come and go
                jax.profiler.start_trace(str(epath.Path(workdir) / "profile"), profiler_options=options)
                profiling = True
            state, metrics = step_fn(state, put(next(loader)))
            values = jax.device_get(metrics)  # waits: signals and errors belong to the step that caused them
            tokens, steps = tokens + float(values["tokens"]), steps + 1
            bar.update()
            if profiling and step + 1 >= config.profile_start + config.profile_steps:
                jax.profiler.stop_trace()
                profiling = False
            if int(values["bad_steps"]) >= config.max_bad_steps:
                save(step)
                _settle(checkpoints)
                checkpoints.wait()
                raise TrainingError(
                    f"loss or gradient was not finite in {config.max_bad_steps} consecutive steps up to step {step}; "
                    "the last good parameters are saved; start again in a new --workdir with a "
                    "lower optimizer.learning_rate or plan.precision=fp32"
                )
            final = step == config.steps
            if step == 1 or step % config.log_every == 0 or final:
                log(step, values)
            if final or (config.eval_every and step % config.eval_every == 0):
                with untimed():
                    last_eval, evaluated = evaluate(state), step
                    if last_eval:
                        writer.write(step, last_eval)
                        bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in last_eval.items()))
            stopping = _agreed(bool(stop))
            if final or step % config.checkpoint_every == 0 or stopping:
                with untimed():
                    save(step)
                saved = step
            if stopping:
                break
        _settle(checkpoints)
        checkpoints.wait()
        if profiling:
            jax.profiler.stop_trace()
        if stopping and saved < config.steps:
            raise Interrupted(f"interrupted: saved step {saved} of {config.steps}")
    return state, last_eval or evaluate(state)


OF_LABELS = ("label", "start")  # terms that predict no token
NEXT_TOKEN: Mapping[str, float] = types.MappingProxyType({"next_token": 1.0})


def summarize(
    sums: dict[str, float],
    weights: dict[str, float],
    tokens_per_byte: float,
    coefficients: Mapping[str, float] = NEXT_TOKEN,
) -> dict[str, float]:
    """Evaluation numbers from summed scores.

    The loss (nats a token or a label), the perplexity of its first term where that predicts tokens, its terms where
    there are several, accuracies, and bits per byte of a causal model.
    """
    mean = {name: value / max(weights[name], 1e-9) for name, value in sums.items()}
    first = next(iter(coefficients))
    out = {"eval/loss": sum(c * mean[name] for name, c in coefficients.items())}
    if first not in OF_LABELS:
        out["eval/perplexity"] = math.exp(min(mean[first], 700.0))
    several = len(coefficients) > 1
    out |= {f"eval/{name}": value for name, value in mean.items() if several or name not in coefficients}
    if tokens_per_byte and first == "next_token":
        out["eval/bits_per_byte"] = mean[first] * tokens_per_byte / math.log(2)
    return out
