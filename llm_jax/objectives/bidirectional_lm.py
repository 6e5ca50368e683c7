"""Two language models on one text, one in each direction: ELMo's pre-training.

Sources: Peters et al. 2018, section 3.1, https://arxiv.org/abs/1802.05365; Jozefowicz et al. 2016 (sampled softmax over
a log-uniform proposal), https://arxiv.org/abs/1602.02410.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.output import sampled_softmax
from llm_jax.nn.protocols import Batch
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.objective import NATS_PER_TOKEN, Prepared, rows_that_count

DIRECTIONS = ("forward", "backward")


class Targets(NamedTuple):
    """What `BidirectionalLM.score` needs.

    Attributes:
      labels: `[B, T]` for each direction.
      weights: `[B, T]` for each direction, 0 or 1.
      sampled_S: entries that the sampled softmax compares with, None for all.
    """

    labels: tuple[jax.Array, jax.Array]
    weights: tuple[jax.Array, jax.Array]
    sampled_S: jax.Array | None


def log_uniform(vocab_size: int) -> jax.Array:
    """`[V]` log-probabilities of a proposal that falls with the rank: log((k + 2) / (k + 1)) / log(V + 1).

    Entries must be sorted by frequency, as trained vocabularies are.
    """
    rank = jnp.arange(vocab_size, dtype=jnp.float32)
    return jnp.log(jnp.log1p(1 / (rank + 1)) / math.log(vocab_size + 1))


@dataclasses.dataclass(frozen=True)
class BidirectionalLM:
    """Mean cross-entropy of the next word given those before it and of the word before given those behind.

    Attributes:
      samples: entries of the sampled softmax, shared by a batch; 0 takes all.
      carry: the LSTMs' states run on from batch to batch.
      vocab_size: entries of the proposal; 0 leaves it to `for_run`.
    """

    tag: ClassVar[str] = "bidirectional_lm"
    perplexity: ClassVar[bool] = True
    bits_per_byte: ClassVar[bool] = False
    loss_unit: ClassVar[str] = NATS_PER_TOKEN

    samples: int = 0
    carry: bool = False
    vocab_size: int = 0

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.samples < 0:
            raise ValueError(f"samples={self.samples} must not be negative")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Fills in what is left open.

        Raises:
          ValueError: if the model is not an ELMo with an output layer.
        """
        del devices, mask_id
        if model.reads != "characters" or not model.vocab_size:
            raise ValueError("objective BidirectionalLM needs an ElmoConfig with vocab_size")
        if self.samples > model.vocab_size:
            raise ValueError(f"samples={self.samples} exceed the vocabulary of {model.vocab_size}")
        return dataclasses.replace(self, vocab_size=self.vocab_size or model.vocab_size)

    def plain(self) -> Self:
        """The objective with the full softmax and without a carry, for evaluation."""
        return dataclasses.replace(self, samples=0, carry=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the two directions."""
        return dict.fromkeys(DIRECTIONS, 0.5)

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Shifts both ways.

        Args:
          batch: `input_ids` `[B, T + 1]` (words) and `character_ids` `[B, T + 1, M]`; rows whose `loss_weights` are all
            zero do not count.
          key: the samples are drawn from it.
        """
        ids, characters = batch["input_ids"], batch["character_ids"][:, :-1]
        real = jnp.broadcast_to(rows_that_count(batch)[:, None], ids.shape).astype(jnp.float32)
        before = jnp.concatenate([ids[:, :1], ids[:, :-2]], axis=1)
        first = jnp.zeros_like(real[:, :1])  # nothing is known before a row
        weights = (real[:, 1:], jnp.concatenate([first, real[:, 1:-1]], axis=1))
        sampled = None
        if self.samples:
            sampled = jax.random.categorical(key, log_uniform(self.vocab_size), shape=(self.samples,))
        totals = {name: jnp.sum(w) for name, w in zip(DIRECTIONS, weights, strict=True)}
        targets = Targets((ids[:, 1:], before), weights, sampled)
        return Prepared({"input_ids": characters}, targets, {**totals, "tokens": jnp.sum(real[:, 1:])})

    def score(self, output: Any, targets: Targets) -> dict[str, jax.Array]:
        """Sums of the losses of both directions."""
        halves = jnp.split(output.last_hidden_state, 2, axis=-1)
        scores = {}
        for name, h_BTP, labels, weights in zip(DIRECTIONS, halves, targets.labels, targets.weights, strict=True):
            if targets.sampled_S is None:
                scores[name] = cross_entropy_sums(h_BTP, output.head, labels, weights)[0]
                continue
            flat = h_BTP.reshape(-1, h_BTP.shape[-1])
            log_count = log_uniform(self.vocab_size) + math.log(self.samples)
            loss = sampled_softmax(flat, output.head, labels.reshape(-1), targets.sampled_S, log_count)
            scores[name] = jnp.sum(loss * weights.reshape(-1))
        return scores
