"""What happens between the steps of a run: lines of metrics, evaluations, checkpoints, a profile."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from llm_jax.nn.protocols import Batch
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.metrics import MetricsWriter
from llm_jax.training.state import TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Numbers = dict[str, float]


class Moment(NamedTuple):
    """What a hook sees after a step.

    Attributes:
      step: number of the step, counted from 1.
      state: the state after it.
      metrics: numbers of the step, on the host.
      seconds: from the request for its batch to its metrics.
      last: whether the run ends with it.
    """

    step: int
    state: TrainState
    metrics: Mapping[str, Any]
    seconds: float
    last: bool


Hook = Callable[[Moment], None]


@dataclasses.dataclass(frozen=True)
class Every:
    """A hook that runs after every `steps`-th step and after the last one.

    Attributes:
      steps: 0 for the last step alone.
      run: the hook.
      first: also after the first step.
    """

    steps: int
    run: Hook
    first: bool = False

    def __call__(self, moment: Moment) -> None:
        """Runs the hook if it is due after this step."""
        due = self.steps and moment.step % self.steps == 0
        if moment.last or due or (self.first and moment.step == 1):
            self.run(moment)


def agreed(stop: bool) -> bool:
    """True in every process of the job as soon as one of them was asked to stop: saving is a joint act."""
    if jax.process_count() == 1:
        return stop
    return bool(multihost_utils.process_allgather(np.asarray(stop)).any())


class Report:
    """The progress bar and the lines of `metrics.jsonl`; only the first process shows the bar."""

    def __init__(
        self,
        writer: MetricsWriter,
        first: int,
        steps: int,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        learning_rate: Callable[[Moment], float] | None = None,
    ) -> None:
        """Opens the bar.

        Args:
          writer: where numbers go.
          first: steps that were done before.
          steps: of the whole run.
          flops_per_step: model FLOPs of all devices together, for model FLOP/s.
          peak_flops: of all devices together; adds `train/mfu`, model FLOPs over peak.
          learning_rate: of the step that was done; adds `train/learning_rate`.
        """
        self._writer, self._learning_rate = writer, learning_rate
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._seconds, self._tokens, self._steps = 0.0, 0.0, 0
        self._warm = False  # the first line has the seconds of compilation in it and shows no speed
        every = 0.2 if sys.stderr.isatty() else 10.0  # seconds between redraws; a log file gets few lines
        self._bar = tqdm(
            total=steps, initial=first, unit="step", mininterval=every, dynamic_ncols=True,
            disable=jax.process_index() != 0,
        )  # fmt: skip

    def count(self, moment: Moment) -> None:
        """Advances the bar by one step; call after every step."""
        self._seconds += moment.seconds
        self._tokens += float(moment.metrics["tokens"])
        self._steps += 1
        self._bar.update()

    def line(self, moment: Moment) -> None:
        """Writes the metrics of a step, and the speed since the line before; a hook."""
        values = {f"train/{k}": float(v) for k, v in moment.metrics.items() if k != "bad_steps"}
        if self._learning_rate is not None:
            values["train/learning_rate"] = self._learning_rate(moment)
        shown = f"loss {values['train/loss']:.3f}"
        if self._warm:
            values["train/tokens_per_second"] = self._tokens / self._seconds
            values["train/model_flops_per_second"] = self._steps * self._flops_per_step / self._seconds
            if self._peak_flops:
                values["train/mfu"] = values["train/model_flops_per_second"] / self._peak_flops
            shown += f", {values['train/tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._writer.write(moment.step, values)
        self._seconds, self._tokens, self._steps, self._warm = 0.0, 0.0, 0, True

    def evaluation(self, step: int, numbers: Numbers) -> None:
        """Writes and shows the numbers of an evaluation."""
        self._writer.write(step, numbers)
        self._bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))

    def close(self) -> None:
        """Ends the bar and flushes the metrics."""
        self._bar.close()
        self._writer.close()


class Evaluation:
    """Measures the state at some steps; a hook.

    Attributes:
      numbers: of the last evaluation, empty before the first.
      step: its step, -1 before the first.
    """

    def __init__(self, measure: Callable[[TrainState], Numbers], report: Report) -> None:
        """Measures nothing yet.

        Args:
          measure: numbers of a state, none where there is nothing to measure on.
          report: shows them.
        """
        self._measure, self._report = measure, report
        self.numbers: Numbers = {}
        self.step = -1

    def __call__(self, moment: Moment) -> None:
        """Evaluates after a step."""
        self.numbers, self.step = self._measure(moment.state), moment.step
        if self.numbers:
            self._report.evaluation(moment.step, self.numbers)

    def of(self, state: TrainState) -> Numbers:
        """The last numbers; measured now where nothing was before."""
        return self.numbers or self._measure(state)


class Saves:
    """Writes checkpoints at some steps; a hook.

    Attributes:
      newest: step of the newest one that this run wrote, -1 before.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        info: Mapping[str, Any],
        position: Callable[[], dict[str, Any]],
        evaluation: Evaluation | None = None,
    ) -> None:
        """Writes nothing yet.

        Args:
          checkpoints: where to.
          info: saved with every checkpoint.
          position: where the data stand.
          evaluation: ranks checkpoints for `keep_best`.
        """
        self._checkpoints, self._info, self._position = checkpoints, info, position
        self._evaluation = evaluation
        self.newest = -1

    def __call__(self, moment: Moment) -> None:
        """Writes a checkpoint of a step, once."""
        if self.newest == moment.step:
            return
        self._settle()
        measured = self._evaluation
        metrics = measured.numbers if measured is not None and measured.step == moment.step else None
        info = {**self._info, "data": self._position()}
        self._checkpoints.save(moment.step, moment.state, info, metrics or None)
        self.newest = moment.step

    def wait(self) -> None:
        """Waits until everything is written; errors of the disk surface here."""
        self._settle()
        self._checkpoints.wait()

    def _settle(self) -> None:
        """Until no process of the job writes any more, in a way that fails at once where one of them has died.

        Orbax would wait at a barrier for the dead one, until its missing heartbeats end this process without a word.
        """
        while jax.process_count() > 1 and agreed(self._checkpoints.saving()):
            pass


@contextlib.contextmanager
def profiled(step_fn: StepFn, folder: epath.PathLike, first: int, count: int) -> Iterator[StepFn]:
    """The step function, `count` of its calls from step `first` on under the profiler; `first=0` for none.

    Args:
      step_fn: `(state, batch) -> (state, metrics)`.
      folder: the trace goes here.
      first: number of the first step in the trace.
      count: steps in the trace.
    """
    tracing = False

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        nonlocal tracing
        step = int(state.step) + 1
        if step == first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it hooks into every thread, and those of checkpoints come and go
            jax.profiler.start_trace(str(folder), profiler_options=options)
            tracing = True
        state, metrics = step_fn(state, batch)
        if tracing and step + 1 >= first + count:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            tracing = False
        return state, metrics

    try:
        yield run if first else step_fn
    finally:
        if tracing:
            jax.profiler.stop_trace()
