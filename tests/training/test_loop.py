"""The host side of training, with steps that cost nothing."""

import math
import signal

import jax
import numpy as np
import pytest

from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.hooks import Evaluation, Report, Saves
from llm_jax.training.loop import Interrupted, LoopConfig, TrainingError, hooks_of, run_loop, summarize
from llm_jax.training.metrics import MetricsWriter, read_metrics
from llm_jax.training.state import TrainState


class Batches:
    """Counts, and knows where it is."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        return self.taken

    def state(self):
        return {"taken": self.taken}


def state_at(step):
    step = np.int32(step)
    return TrainState(
        step, {"w": np.full(2, step, np.float32)}, {}, None, None, None, jax.random.key(0), None, step * 0
    )


class Run:
    """Runs the loop in a folder; `happens` is called before every step with its number."""

    def __init__(self, folder, happens=lambda step: None, bad=(), start=0, **options):
        self.folder, self.bad, self.evaluated = folder, 0, []
        self.checkpoints = Checkpoints(folder / "checkpoints", options.pop("keep_last", 9), asynchronous=False)

        def step_fn(state, batch):
            happens(batch)
            self.bad = self.bad + 1 if batch in bad else 0
            loss = math.nan if self.bad else 1 / batch
            metrics = {"loss": loss, "tokens": 4.0, "bad_steps": np.int32(self.bad), "next_token": loss}
            return (state_at(batch) if not self.bad else state.replace(step=np.int32(batch))), metrics

        def evaluate(state):
            self.evaluated.append(int(state.step))
            return {"eval/loss": 1.0 / int(state.step)}

        loader, config = Batches(), LoopConfig(**options)
        loader.taken = start
        report = Report(MetricsWriter(folder, start), start, config.steps, flops_per_step=8.0, peak_flops=1e9)
        evaluation = Evaluation(evaluate, report)
        saves = Saves(self.checkpoints, {"a": 1}, loader.state, evaluation)
        hooks = hooks_of(config, report, evaluation, saves)
        try:
            last = run_loop(state_at(start), step_fn, loader, config.steps, saves, hooks)
            self.result = last, evaluation.of(last)
        finally:
            report.close()

    def rows(self, name):
        return [r["step"] for r in read_metrics(self.folder) if name in r]


def test_how_often_what_happens(tmp_path):
    run = Run(tmp_path, steps=10, log_every=4, eval_every=5, checkpoint_every=3)
    assert run.rows("train/loss") == [1, 4, 8, 10]
    assert run.rows("eval/loss") == run.evaluated == [5, 10]
    assert run.checkpoints.steps() == [3, 6, 9, 10]
    assert int(run.result[0].step) == 10 and run.result[1] == {"eval/loss": 0.1}
    last = read_metrics(tmp_path)[-2]
    assert last["train/loss"] == 0.1 and "train/bad_steps" not in last
    rate = last["train/tokens_per_second"]
    assert last["train/model_flops_per_second"] == pytest.approx(2 * rate)
    assert last["train/mfu"] == pytest.approx(2 * rate / 1e9)
    _, info, _ = run.checkpoints.read_run(6)
    assert info["a"] == 1 and info["data"] == {"taken": 6}
    np.testing.assert_array_equal(run.checkpoints.restore(state_at(0), 9).state.params["w"], [9, 9])


def test_only_the_newest_are_kept(tmp_path):
    assert Run(tmp_path, steps=7, checkpoint_every=2, keep_last=2).checkpoints.steps() == [6, 7]


def test_going_on_from_a_step(tmp_path):
    run = Run(tmp_path, start=4, steps=6, log_every=100, checkpoint_every=100)
    assert run.rows("train/loss") == [6] and int(run.result[0].step) == 6


def test_a_finished_run_only_evaluates(tmp_path):
    run = Run(tmp_path, start=6, steps=6)
    assert run.evaluated == [6] and run.result[1] == {"eval/loss": 1 / 6} and run.checkpoints.steps() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="interrupted: saved step 3 of 10"):
        Run(tmp_path, lambda step: signal.raise_signal(number) if step == 3 else None, steps=10, checkpoint_every=100)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps() == [3] and checkpoints.read_run(3)[1]["data"] == {"taken": 3}
    assert signal.getsignal(number) is before


def test_a_loss_that_is_never_finite_again_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match="not finite in 3 consecutive steps up to step 7; .*learning_rate"):
        Run(tmp_path, steps=10, bad=(2, 5, 6, 7), max_bad_steps=3, log_every=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    restored = checkpoints.restore(state_at(0))
    assert restored.step == 7
    np.testing.assert_array_equal(restored.state.params["w"], [4, 4])  # the last good ones
    assert [r["train/loss"] for r in read_metrics(tmp_path)] == [1.0, None, 1 / 3, 1 / 4, None, None]


def test_a_few_bad_steps_are_survived(tmp_path):
    assert int(Run(tmp_path, steps=8, bad=(2, 3, 5, 6), max_bad_steps=3).result[0].step) == 8


def test_summary_by_hand():
    got = summarize(CausalLM(), {"next_token": 6.0, "accuracy": 1.0}, {"next_token": 4.0, "accuracy": 4.0}, 0.25)
    want = {
        "eval/loss": 1.5,
        "eval/perplexity": math.exp(1.5),
        "eval/accuracy": 0.25,
        "eval/bits_per_byte": 1.5 * 0.25 / math.log(2),
    }
    assert got == pytest.approx(want)
    assert "eval/bits_per_byte" not in summarize(
        CausalLM(), {"next_token": 1.0, "accuracy": 0.0}, {"next_token": 1.0, "accuracy": 1.0}, 0.0
    )


@pytest.mark.parametrize(
    "fields, words",
    [({n: 0}, f"{n}=0 must be at least 1") for n in ("steps", "batch_size", "sequence_length", "accumulation")]
    + [({"ema": 1.0}, "ema=1.0 must lie in"), ({"checkpoint_every": -1}, "checkpoint_every=-1 must be at least 1")],
)  # fmt: skip
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        LoopConfig(**fields)
