"""The protocol of objectives: what a run asks of each."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from llm_jax.models.shared.heads import LANGUAGE
from llm_jax.nn.protocols import Batch

IGNORED = -100  # a label that does not count, as in torch and transformers
NATS_PER_TOKEN = "cross-entropy (nats per token)"


class Prepared(NamedTuple):
    """One micro-batch, ready for the model.

    Attributes:
      inputs: keyword arguments of the model's call.
      targets: what `score` needs.
      weights: `{term: float32 sum of weights}`; totalled over micro-batches and devices before the loss divides. An
        entry `tokens` counts those that went through the model, where the first term's weight does not.
    """

    inputs: dict[str, jax.Array]
    targets: Any
    weights: dict[str, jax.Array]


class Objective(Protocol):
    """A frozen dataclass of settings. The loss is the sum over terms of coefficient * score / total weight.

    Attributes:
      tag: names the objective in config files and work directories.
      perplexity: the first term is a mean of nats a token, so its exponential is a perplexity.
      bits_per_byte: the first term covers all tokens of a text, each given those before it, so it measures bits a byte.
    """

    tag: ClassVar[str]
    perplexity: ClassVar[bool]
    bits_per_byte: ClassVar[bool]

    @property
    def carry(self) -> bool:
        """Whether the model's memories or states run on from batch to batch."""
        ...

    @property
    def loss_unit(self) -> str:
        """Name of the loss, as plots label it."""
        ...

    @property
    def coefficients(self) -> dict[str, float]:
        """`{term: coefficient}`; the first term is the one that is reported as a perplexity or in bits."""
        ...

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Fills in what the settings leave open.

        Args:
          devices: of the mesh.
          model: the config of the model that trains.
          mask_id: the tokenizer's mask token, None without.

        Raises:
          ValueError: if the model does not give what is scored.
        """
        ...

    def plain(self) -> Self:
        """The objective without regularisers, samples and carry, as evaluation takes it."""
        ...

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Masks, corrupts, permutes or shifts a batch; a pure function."""
        ...

    def score(self, output: Any, targets: Any) -> dict[str, jax.Array]:
        """`{term: float32 sum}` of a model's `Output`."""
        ...


def check_predicts(objective: Objective, model: Any) -> None:
    """Refuses a model config whose head predicts no tokens.

    Raises:
      ValueError: naming the head.
    """
    head = getattr(model, "head", "lm")
    if head not in LANGUAGE:
        raise ValueError(f"objective {type(objective).__name__} needs model.head='lm', not {head!r}")


def rows_that_count(batch: Batch) -> jax.Array:
    """`[B]` bool: False for rows whose `loss_weights` are all zero, which fill the last batch of an evaluation."""
    if "loss_weights" not in batch:
        return jnp.ones(batch["input_ids"].shape[:1], bool)
    return jnp.any(batch["loss_weights"] > 0, axis=1)


def total_loss(objective: Objective, scores: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> jax.Array:
    """The loss from score sums and total weights; a term without weight counts nothing."""
    total = jnp.float32(0)
    for term, coefficient in objective.coefficients.items():
        total = total + coefficient * scores[term] / jnp.maximum(weights[term], 1e-8)
    return total
