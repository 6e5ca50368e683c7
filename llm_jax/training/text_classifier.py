"""Trains word vectors under an LSTM or a CNN with the steps, loop, checkpoints and metrics of every run.

Of the checkpoints, one an epoch, the best on the held-out texts (lowest loss) becomes the model.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax import config as configs
from llm_jax.classic.words import Words
from llm_jax.data.loader import Loader
from llm_jax.interop import text_classifier
from llm_jax.interop.text_classifier import LogProbs
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.nn import weights
from llm_jax.objectives.labels import Labels
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import metrics
from llm_jax.training.loop import LoopConfig, run_loop
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run import RunConfig, evaluate_rows
from llm_jax.training.text_words import Known, TextConfig, Texts
from llm_jax.training.workdir import Workdir

log = logging.getLogger(__name__)
REST = ("re:(?!embed/).*",)  # everything but the table


def sized(model: TextClassifierConfig, known: Known, embedding: str) -> TextClassifierConfig:
    """The model's config for a vocabulary: as wide as its vectors, or projecting them to its own width."""
    sizes: dict[str, Any] = {"vocab_size": len(known.words)}
    if known.table is not None:
        width = known.table.shape[1]
        sizes |= {"embedding_dim": width} if embedding == "projected" else {"model_dim": width}
    return dataclasses.replace(model, **sizes)


def train(
    model: TextClassifierConfig,
    config: TextConfig,
    known: Known,
    texts: tuple[Sequence[str], np.ndarray],
    held: tuple[Sequence[str], np.ndarray] | None,
    folder: epath.PathLike,
) -> LogProbs:
    """Trains, or goes on with what the folder holds, and writes the best model there.

    Args:
      model: its vocabulary and the width of its words are those of `known`.
      config: how.
      known: see `know`.
      texts: what is trained on, and the numbers of their classes.
      held: what tells the best epoch; without it the last one is taken.
      folder: of this run, which is one process; batches are divided over as many of its devices as divide them.

    Returns:
      Log-probabilities of the classes of texts, see `interop.text_classifier.log_probs`.

    Raises:
      WorkdirError: where another run's settings lie in the folder.
      TrainingError: where the loss stays without a number.
    """
    model = sized(model, known, config.embedding)
    rows, held_rows = (None if part is None else _rows(part, known.words, config.max_length) for part in (texts, held))
    assert rows is not None
    epoch = -(-len(rows) // config.batch_size)
    loop = LoopConfig(
        *(config.epochs * epoch, config.batch_size, rows.ids.shape[1]), seed=config.seed, log_every=max(1, epoch // 10),
        eval_every=epoch, checkpoint_every=epoch, keep_last=1, keep_best=int(held_rows is not None),
        trainable=None if config.embedding == "trained" else REST,
    )  # fmt: skip
    optimizer = OptimizerConfig("adam", config.learning_rate, "constant", b2=0.999, weight_decay=0.0, clip_norm=5.0)
    devices = math.gcd(config.batch_size, jax.device_count())
    objective = Labels()
    run = RunConfig(model=model, objective=objective, optimizer=optimizer, plan=PlanConfig(data=devices), training=loop)
    plan = Plan(run.plan, model, jax.devices()[:devices])
    settings = {name: configs.to_dict(part) for name, part in (("model", model), ("training", loop), ("how", config))}
    del settings["how"]["epochs"]  # more of them go on with a finished run
    given = None if known.table is None else _first(model, known.table, config.seed)
    program = build(run, plan, None, given)
    with Workdir(folder) as work:
        work.settle_config(settings)
        checkpoints = Checkpoints(work.path / "checkpoints", loop.keep_last, loop.keep_best)
        loader = Loader(rows, config.batch_size, config.seed)
        if checkpoints.latest() is None:
            placed = None if given is None else jax.device_put(given, program.places)
            state = program.init(jax.random.key(config.seed), placed)
        else:
            restored = checkpoints.restore(program.shapes, None, program.shardings)
            state = restored.state
            loader.restore(restored.run["data"])
            log.info("resuming from step %d", restored.step)
        place = lambda batch: jax.device_put(batch, plan.batch_sharding())
        terms = objective.coefficients

        def evaluate(state: Any) -> dict[str, float]:
            if held_rows is None:
                return {}
            return evaluate_rows(program.evaluate, state.params, held_rows, config.batch_size, 0, place, 0.0, terms)

        writer = metrics.MetricsWriter(folder, int(state.step))
        try:
            state, _ = run_loop(
                *(state, program.step, loader, place, checkpoints, writer, loop, evaluate, {"config": settings}),
                workdir=folder,
            )
            params, _ = checkpoints.restore_params(_best(checkpoints, folder))
        finally:
            writer.close()
            checkpoints.close()
        metrics.plot_loss(folder, objective.loss_unit)
    text_classifier.save(model, params, known.words, config.max_length, folder)
    return text_classifier.log_probs(model, params, known.words, config.max_length)


def _rows(part: tuple[Sequence[str], np.ndarray], words: Words, limit: int) -> Texts:
    ids, cut = words.encode(part[0], limit)
    if cut:
        log.info("%s of %s texts cut to %d words", f"{cut:,}", f"{len(ids):,}", limit)
    return Texts(ids, part[1])


def _first(model: TextClassifierConfig, table: np.ndarray, seed: int) -> Any:
    """Fresh parameters with this table."""
    module = model.make()
    fresh = jax.jit(lambda key: module.init(key, np.ones((1, 1), np.int32))["params"])(jax.random.key(seed))
    params = weights.split_axes(fresh)[0]
    return {**params, "embed": {"embedding": jnp.asarray(table)}}


def _best(checkpoints: Checkpoints, folder: epath.PathLike) -> int | None:
    """The step of the lowest held-out loss among those that are kept; None where none was measured."""
    kept = set(checkpoints.steps())
    losses = {r["step"]: r["eval/loss"] for r in metrics.read_metrics(folder) if r.get("eval/loss") is not None}
    return min((s for s in losses if s in kept), key=losses.__getitem__, default=None)
