"""What every objective is."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from llm_jax.models.shared.heads import LANGUAGE

Batch = Mapping[str, jax.Array]
IGNORED = -100  # a label that does not count, as in torch and transformers


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
    """The loss is the sum over terms of coefficient * score / total weight."""

    @property
    def coefficients(self) -> dict[str, float]:
        """`{term: coefficient}`."""
        ...

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Masks, corrupts, permutes or shifts; pure."""
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


def total_loss(objective: Objective, scores: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> jax.Array:
    """The loss from score sums and total weights; a term without weight counts nothing."""
    total = jnp.float32(0)
    for term, coefficient in objective.coefficients.items():
        total = total + coefficient * scores[term] / jnp.maximum(weights[term], 1e-8)
    return total
