"""The training loop: steps, hooks between them, and signals that end it.

Everything here is host-side; what is computed lives in `step.py`.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from llm_jax.nn.protocols import Batch
from llm_jax.objectives.objective import Objective
from llm_jax.training.hooks import Evaluation, Every, Hook, Moment, Report, Saves, StepFn, agreed
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
      keep_last: so many of the newest checkpoints stay.
      keep_best: so many checkpoints with the lowest eval/loss stay beside them.
      max_bad_steps: consecutive non-finite steps before the run stops.
      ema: decay of the moving average of the parameters, 0 for none. Where it is on, evaluations and keep_best measure
        the average, and the run hands it on; the parameters themselves continue to train.
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


def stop_after(bad_steps: int, saves: Saves) -> Hook:
    """A hook that saves and raises `TrainingError` after so many consecutive steps that were not finite."""

    def check(moment: Moment) -> None:
        if int(moment.metrics["bad_steps"]) < bad_steps:
            return
        saves(moment)
        saves.wait()
        raise TrainingError(
            f"loss or gradient was not finite in {bad_steps} consecutive steps up to step {moment.step}; "
            "the last good parameters are saved; start again in a new --workdir with a "
            "lower optimizer.learning_rate or plan.precision=fp32"
        )

    return check


def hooks_of(config: LoopConfig, report: Report, evaluation: Evaluation, saves: Saves) -> list[Hook]:
    """What a run does between its steps, in this order."""
    return [
        report.count,
        stop_after(config.max_bad_steps, saves),
        Every(config.log_every, report.line, first=True),
        Every(config.eval_every, evaluation),
        Every(config.checkpoint_every, saves),
    ]


def run_loop(
    state: TrainState, step_fn: StepFn, batches: Iterator[Batch], steps: int, saves: Saves, hooks: Sequence[Hook]
) -> TrainState:
    """Runs from the state's step to step number `steps`; the last state.

    Args:
      state: where to start.
      step_fn: jitted step, takes the state over.
      batches: on the devices.
      steps: of the whole run.
      saves: writes what was learned where a signal ends the run.
      hooks: called after every step.

    Raises:
      TrainingError: from a hook.
      Interrupted: on SIGINT or SIGTERM; the state is saved.
    """
    with _stop_signals() as signals:
        for step in range(int(state.step) + 1, steps + 1):
            began = time.perf_counter()
            state, metrics = step_fn(state, next(batches))
            numbers = jax.device_get(metrics)  # waits: signals and errors belong to the step that caused them
            moment = Moment(step, state, numbers, time.perf_counter() - began, last=step == steps)
            for hook in hooks:
                hook(moment)
            if agreed(bool(signals)) and not moment.last:
                saves(moment)
                saves.wait()
                raise Interrupted(f"interrupted: saved step {step} of {steps}")
        saves.wait()
    return state


def summarize(
    objective: Objective, sums: dict[str, float], weights: dict[str, float], tokens_per_byte: float = 0.0
) -> dict[str, float]:
    """Evaluation numbers from summed scores.

    The loss (nats a token or a label), the perplexity and the bits per byte of its first term where these mean
    something, its terms where there are several, and accuracies.

    Args:
      objective: what was scored.
      sums: of every term.
      weights: of every term.
      tokens_per_byte: of the text; 0 where there is none.
    """
    coefficients = objective.coefficients
    mean = {name: value / max(weights[name], 1e-9) for name, value in sums.items()}
    first = next(iter(coefficients))
    out = {"eval/loss": sum(c * mean[name] for name, c in coefficients.items())}
    if objective.perplexity:
        out["eval/perplexity"] = math.exp(min(mean[first], 700.0))
    several = len(coefficients) > 1
    out |= {f"eval/{name}": value for name, value in mean.items() if several or name not in coefficients}
    if tokens_per_byte and objective.bits_per_byte:
        out["eval/bits_per_byte"] = mean[first] * tokens_per_byte / math.log(2)
    return out
