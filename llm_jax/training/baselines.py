"""What guessing by frequency loses: the losses that an evaluation stands beside."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from llm_jax.data import tokens
from llm_jax.data.loader import eval_batches
from llm_jax.data.rows.source import RowSource
from llm_jax.data.tokens import TokenStore
from llm_jax.nn.protocols import Batch

if TYPE_CHECKING:
    from llm_jax.training.run_config import RunConfig

COUNTED = 64  # batches whose labels are counted

Baseline = Callable[["RunConfig", Mapping[str, TokenStore], RowSource, RowSource], float]


def unigram(config: "RunConfig", stores: Mapping[str, TokenStore], train: RowSource, held_out: RowSource) -> float:
    """Loss of the training part's frequencies of tokens; 0 where only some tokens are trained."""
    del train, held_out
    text = stores["validation"]
    if not text.text_bytes or text.weights is not None:
        return 0.0
    return tokens.unigram_loss(stores["train"], text, config.model.vocab_size)


def masked(config: "RunConfig", stores: Mapping[str, TokenStore], train: RowSource, held_out: RowSource) -> float:
    """`unigram`, with a guess at every pair's label."""
    loss = unigram(config, stores, train, held_out)
    pair = config.objective.coefficients.get("pair", 0.0) if config.data.pairs != "none" else 0.0
    return loss + pair * math.log(2) if loss else 0.0


def targets(config: "RunConfig", stores: Mapping[str, TokenStore], train: RowSource, held_out: RowSource) -> float:
    """Loss of the frequencies of an encoder-decoder's labels in some training batches."""
    del stores
    seen, asked = _label_counts(config, train), _label_counts(config, held_out)
    return tokens.unigram_nats(seen, asked)


def _label_counts(config: "RunConfig", rows: RowSource) -> np.ndarray:
    """`[V]`: how often each entry is a label."""
    objective = config.objective.for_run(1, config.model, None)

    @jax.jit
    def labels(batch: Batch) -> tuple[jax.Array, jax.Array]:
        ids, weights = objective.prepare(batch, jax.random.key(0)).targets
        return ids, weights > 0

    counts = np.zeros(config.model.vocab_size, np.int64)
    for batch in eval_batches(rows, config.training.batch_size, COUNTED):
        ids, real = jax.device_get(labels(batch))
        counts += np.bincount(ids[real], minlength=len(counts))
    return counts
