"""Trains word vectors under an LSTM or a CNN, as every run trains.

Of the checkpoints, one an epoch, the best on the held-out texts (lowest loss) becomes the model.
"""

import dataclasses
import logging
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax import config as configs
from llm_jax.classic.text.vocabulary import Words
from llm_jax.data.loader import Loader
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.nn import weights
from llm_jax.nn.protocols import Params
from llm_jax.objectives.labels import Labels
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.tasks.classification_rows import TextConfig, Texts, WordTable
from llm_jax.training import metrics
from llm_jax.training.loop import LoopConfig, TrainingError
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run import HeldOut, run_program
from llm_jax.training.run_config import RunConfig
from llm_jax.training.workdir import Workdir

log = logging.getLogger(__name__)
STATIC = {"trained": "", "frozen": "embed", "projected": "embed", "both": "embed_static"}  # tables as they were read


def sized(model: TextClassifierConfig, vocabulary: WordTable, embedding: str) -> TextClassifierConfig:
    """The model's config for a vocabulary: as wide as its vectors, or projecting them to its own width."""
    sizes: dict[str, Any] = {"vocab_size": len(vocabulary.words), "two_channels": embedding == "both"}
    if vocabulary.table is not None:
        width = vocabulary.table.shape[1]
        sizes |= {"embedding_dim": width} if embedding == "projected" else {"model_dim": width}
    return dataclasses.replace(model, **sizes)


def train(
    model: TextClassifierConfig,
    config: TextConfig,
    vocabulary: WordTable,
    texts: tuple[Sequence[str], np.ndarray],
    held_out: tuple[Sequence[str], np.ndarray] | None,
    folder: epath.PathLike,
) -> tuple[TextClassifierConfig, Params]:
    """Trains, or resumes what the folder holds.

    Args:
      model: its vocabulary and the width of its words are those of `vocabulary`.
      config: how.
      vocabulary: see `word_table`.
      texts: what is trained on, and the numbers of their classes.
      held_out: what tells the best epoch; without it the last one is taken.
      folder: of this run, which is one process; batches are divided over as many of its devices as divide them.

    Returns:
      (the model's config, parameters of the best epoch), for `interop.classifier_folder`.

    Raises:
      WorkdirError: where the folder holds a run with other settings, texts, labels or vectors.
      TrainingError: where the loss stays without a number.
    """
    model = sized(model, vocabulary, config.embedding)
    rows = _rows(texts, vocabulary.words, config.max_length)
    held_out_rows = None if held_out is None else _rows(held_out, vocabulary.words, config.max_length)
    epoch = -(-len(rows) // config.batch_size)
    loop = LoopConfig(
        steps=config.epochs * epoch, batch_size=config.batch_size, sequence_length=rows.ids.shape[1],
        seed=config.seed, log_every=max(1, epoch // 10), eval_every=epoch, checkpoint_every=epoch, keep_last=1,
        keep_best=int(held_out_rows is not None),
        trainable=(f"re:(?!{static}/).*",) if (static := STATIC[config.embedding]) else None,
    )  # fmt: skip
    optimizer = OptimizerConfig("adam", config.learning_rate, "constant", b2=0.999, weight_decay=0.0, clip_norm=5.0)
    devices = math.gcd(config.batch_size, jax.device_count())
    run = RunConfig(model=model, objective=Labels(), optimizer=optimizer, plan=PlanConfig(devices), training=loop)
    plan = Plan(run.plan, model, jax.devices()[:devices])
    settings = {name: configs.to_dict(part) for name, part in (("model", model), ("training", loop), ("how", config))}
    del settings["how"]["epochs"]  # with more of them a finished run resumes
    settings["crc32"] = _checksums(rows, held_out_rows, vocabulary)
    given = None if vocabulary.table is None else _first(model, vocabulary.table, config.seed)
    program = build(run, plan, None, given)
    with Workdir(folder) as work:
        work.settle_config(settings)
        loader = Loader(rows, config.batch_size, config.seed)
        try:
            run_program(program, run, plan, loader, HeldOut(held_out_rows), work.path, settings, given)
        except TrainingError:
            wrong = f"the loss or its gradient was not finite in {loop.max_bad_steps} steps on end"
            rate = f"a learning_rate below {config.learning_rate}"
            raise TrainingError(f"{wrong}: start again in another folder than {folder}, with {rate}") from None
        checkpoints = Checkpoints(work.path / "checkpoints", loop.keep_last, loop.keep_best)
        params, _ = checkpoints.restore_params(_best(checkpoints, folder))
        checkpoints.close()
    return model, params


def _checksums(rows: Texts, held_out: Texts | None, vocabulary: WordTable) -> dict[str, int | None]:
    """Checksums of what is trained on: a run resumes on the same only."""

    def of_texts(part: Texts) -> int:
        return zlib.crc32(part.classes.tobytes(), zlib.crc32(part.ids.tobytes()))

    return {
        "texts": of_texts(rows),
        "held": None if held_out is None else of_texts(held_out),
        "words": zlib.crc32("\n".join(vocabulary.words.words).encode(errors="surrogatepass")),
        "vectors": None if vocabulary.table is None else zlib.crc32(vocabulary.table.tobytes()),
    }


def _rows(part: tuple[Sequence[str], np.ndarray], words: Words, limit: int) -> Texts:
    ids, cut = words.encode(part[0], limit)
    if cut:
        log.info("%s of %s texts cut to %d words", f"{cut:,}", f"{len(ids):,}", limit)
    return Texts(ids, part[1])


def _first(model: TextClassifierConfig, table: np.ndarray, seed: int) -> Params:
    """Initial parameters with a given embedding table."""
    module = model.make()
    fresh = jax.jit(lambda key: module.init(key, np.ones((1, 1), np.int32))["params"])(jax.random.key(seed))
    params = weights.split_axes(fresh)[0]
    tables = {name: {"embedding": jnp.asarray(table)} for name in ("embed", "embed_static") if name in params}
    return {**params, **tables}


def _best(checkpoints: Checkpoints, folder: epath.PathLike) -> int | None:
    """The step of the lowest held-out loss among those that are kept; None where none was measured."""
    stored = set(checkpoints.steps())
    losses = {r["step"]: r["eval/loss"] for r in metrics.read_metrics(folder) if r.get("eval/loss") is not None}
    return min((s for s in losses if s in stored), key=losses.__getitem__, default=None)
