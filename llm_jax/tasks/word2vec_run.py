"""Trains word2vec with the loop, checkpoints and metrics of every run."""

import dataclasses
import logging
import statistics
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import Reader
from llm_jax.classic.vectors import noise, word2vec
from llm_jax.classic.vectors.windows import Windows
from llm_jax.classic.vectors.word2vec import Lookup, Word2VecConfig
from llm_jax.nn.protocols import Batch
from llm_jax.parallel.mesh import make_mesh
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import metrics
from llm_jax.training.hooks import Evaluation, Report, Saves
from llm_jax.training.loop import LoopConfig, hooks_of, run_loop
from llm_jax.training.state import TrainState
from llm_jax.training.workdir import Workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Word2VecSchedule:
    """How long and how fast word2vec learns.

    Attributes:
      epochs: times through the text.
      rate: learning rate at the beginning.
      last_rate: at the end; it falls along a line.
      seed: of the tables, of what stays of the text and of what is drawn.
    """

    epochs: int = 5
    rate: float = 0.025
    last_rate: float = 1e-4
    seed: int = 1

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"learning_rate={self.rate} must be a positive number")
        if not 0 <= self.last_rate <= self.rate:
            raise ValueError(f"last_rate={self.last_rate} must be from 0 to learning_rate={self.rate}")


class Text(NamedTuple):
    """A text by the numbers of its words, without rare ones.

    Attributes:
      words: int32 `[T]`.
      sentences: the sentence of each, int32 `[T]`.
      counts: of words, `[V]`.
      total: words of the text, those that are too rare included.
    """

    words: np.ndarray
    sentences: np.ndarray
    counts: np.ndarray
    total: int


def read(reader: Reader, min_count: int = 5, max_size: int | None = None) -> tuple[list[str], Text]:
    """(vocabulary, text), without the words that are too rare.

    Raises:
      TextError: see `sentences.read`.
    """
    vocabulary, marked = sentences.read(reader, min_count=min_count, max_size=max_size)
    first, is_word = len(sentences.SPECIAL), marked >= len(sentences.SPECIAL)
    of = np.cumsum(marked == sentences.BEGIN, dtype=np.int32)[is_word]
    words = marked[is_word] - np.int32(first)
    total = int(len(marked) - 2 * np.count_nonzero(marked == sentences.BEGIN))
    return vocabulary.words[first:], Text(words, of, np.bincount(words, minlength=len(vocabulary) - first), total)


def make_step(
    config: Word2VecConfig, schedule: Word2VecSchedule, steps: int, words: float
) -> Callable[[TrainState, Batch, Lookup], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, batch, lookup) -> (state, metrics)`; a step whose loss is not finite changes nothing.

    Args:
      config: of the model.
      schedule: of the rate.
      steps: of the run.
      words: of the text, that a step stands for.
    """

    def step(state: TrainState, batch: Batch, lookup: Lookup) -> tuple[TrainState, dict[str, jax.Array]]:
        done = (state.step + jnp.arange(config.blocks) / config.blocks) / steps
        rates = schedule.rate + (schedule.last_rate - schedule.rate) * done
        key = jax.random.fold_in(state.key, state.step)
        tables, value = word2vec.run_blocks(config, dict(state.params), batch, key, lookup, rates)
        sums = [jnp.sum(x) for x in tables.values()]
        finite = jnp.isfinite(value + sums[0] + sums[1])
        bad = jnp.where(finite, 0, state.bad_steps + 1)
        tables = jax.tree.map(lambda new, old: jnp.where(finite, new, old), tables, state.params)
        numbers = {"loss": value, "tokens": jnp.float32(words), "bad_steps": bad}
        return state.replace(step=state.step + 1, params=tables, bad_steps=bad), numbers

    return step


def first_state(config: Word2VecConfig, schedule: Word2VecSchedule, size: int) -> TrainState:
    """Before the first step, of a vocabulary of `size` words."""
    init_key, key = jax.random.split(jax.random.key(schedule.seed))
    params = word2vec.init(config, size, init_key)
    return TrainState(jnp.int32(0), params, (), None, None, None, key, None, jnp.int32(0))


def words_per_second(workdir: epath.PathLike) -> float | None:
    """The median of what a run's metrics say of its speed, None where they say nothing yet."""
    rows = metrics.read_metrics(workdir)
    rates = [r["train/tokens_per_second"] for r in rows if "train/tokens_per_second" in r]
    return statistics.median(rates) if rates else None


def train(
    config: Word2VecConfig,
    schedule: Word2VecSchedule,
    text: Text,
    workdir: epath.PathLike,
    devices: Sequence[jax.Device] | None = None,
    last_step: int | None = None,
) -> np.ndarray:
    """Trains, or resumes what `workdir` holds.

    Args:
      config: of the model.
      schedule: how long and how fast.
      text: see `read`.
      workdir: of this run.
      devices: the tiles of a block are divided over these; all by default.
      last_step: where this start ends; the last of all epochs by default.

    Returns:
      Vectors, float32 `[V, D]`.

    Raises:
      ValueError: where tiles do not divide over devices, or another run's settings lie in `workdir`.
      TrainingError: where the loss stays without a number; what was learned before is saved.
    """
    mesh = make_mesh({"data": len(devices or jax.devices())}, devices)
    if config.tiles % mesh.size:
        raise ValueError(f"a block's {config.tiles} tiles do not divide over {mesh.size} devices: set block")
    keep = noise.keep_probabilities(text.counts, config.sample, config.subsampling)
    windows = Windows(config, text.words, text.sentences, keep, schedule.epochs, schedule.seed)
    settings = {
        "model": dataclasses.asdict(config),
        "schedule": dataclasses.asdict(schedule),
        "text": {"words": text.total, "known": len(text.counts), "crc32": zlib.crc32(text.words.data)},
    }
    whole, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    with Workdir(workdir) as run:
        run.settle_config(settings)
        checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", 1)
        begin = jax.jit(lambda: first_state(config, schedule, len(text.counts)), out_shardings=whole)
        state = begin()
        if checkpoints.latest() is not None:
            shapes = jax.eval_shape(lambda s: s, state)
            restored = checkpoints.restore(shapes, None, jax.tree.map(lambda _: whole, shapes))
            state = restored.state
            windows.restore(restored.run["data"])
            log.info("resuming from step %d", restored.step)
        words = text.total * schedule.epochs / windows.steps
        step = jax.jit(make_step(config, schedule, windows.steps, words), donate_argnums=0, out_shardings=(whole, None))
        lookup = jax.device_put(word2vec.make_lookup(config, text.counts), whole)
        writer = metrics.MetricsWriter(workdir, int(state.step))
        lines, save_every = (max(1, windows.steps // n) for n in (100, 10))
        steps = windows.steps if last_step is None else last_step
        loop = LoopConfig(steps, log_every=lines, checkpoint_every=save_every, max_bad_steps=1)
        report = Report(writer, int(state.step), steps)
        evaluation = Evaluation(lambda _: {}, report)
        checkpointing = Saves(checkpoints, {"config": settings}, windows.state)
        batches = (jax.device_put(batch, divided) for batch in windows)
        hooks = hooks_of(loop, report, evaluation, checkpointing)
        try:
            state = run_loop(state, lambda s, b: step(s, b, lookup), batches, steps, checkpointing, hooks)
        finally:
            report.close()
            checkpoints.close()
        metrics.plot_loss(workdir, "loss (nats per pair)")
    return np.asarray(state.params["context"])
