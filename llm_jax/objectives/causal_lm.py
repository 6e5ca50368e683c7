"""Next-token prediction."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.protocols import Batch
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.objective import NATS_PER_TOKEN, Prepared, check_predicts

# objectives of models that are not causal, by what these read (`models/registry.py`)
INSTEAD = {
    "both_sides": "MaskedLM",
    "any_order": "PermutationLM",
    "characters": "BidirectionalLM",
    "source": "Seq2Seq",
}


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Cross-entropy of every token given those before it.

    Attributes:
      z_loss: coefficient of the mean squared log-partition.
      label_smoothing: mass moved from the label to all entries evenly.
      chunks: parts that the length is cut into; only one part's logits exist at once. 0 leaves it to `for_run`.
    """

    tag: ClassVar[str] = "causal_lm"
    perplexity: ClassVar[bool] = True
    bits_per_byte: ClassVar[bool] = True
    loss_unit: ClassVar[str] = NATS_PER_TOKEN
    carry: ClassVar[bool] = False

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunks: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.z_loss < 0 or self.chunks < 0:
            raise ValueError(f"z_loss={self.z_loss} and chunks={self.chunks} must not be negative")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Chooses `chunks` where it is 0: 4 on one device, else 1 (each would sum the head's gradient over them).

        Raises:
          ValueError: if the model sees what it must predict, or has another head.
        """
        del mask_id
        if model.reads != "causal":
            raise ValueError(f"{type(model).__name__} is not causal: train it with objective {INSTEAD[model.reads]}")
        check_predicts(self, model)
        return dataclasses.replace(self, chunks=self.chunks or (4 if devices == 1 else 1))

    def plain(self) -> Self:
        """The objective without regularisers, for evaluation."""
        return dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of next-token prediction and, where it is on, z-loss."""
        return {"next_token": 1.0, **({"z_loss": self.z_loss} if self.z_loss else {})}

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Shifts the labels by one token.

        Args:
          batch: `input_ids` `[B, T+1]`; optional `segment_ids` `[B, T+1]` (documents, a label never crosses them; 0 is
            padding) and `loss_weights` `[B, T+1]` (weight of predicting each token).
          key: unused; nothing is random here.
        """
        del key
        ids = batch["input_ids"]
        weights = batch.get("loss_weights")
        weights = jnp.ones(ids[:, 1:].shape, jnp.float32) if weights is None else weights[:, 1:].astype(jnp.float32)
        inputs, read = {"input_ids": ids[:, :-1]}, jnp.float32(weights.size)
        if "segment_ids" in batch:
            segments = batch["segment_ids"]
            inputs["segment_ids"] = segments[:, :-1]
            weights = jnp.where(segments[:, 1:] == segments[:, :-1], weights, 0)
            read = jnp.sum(segments[:, :-1] > 0, dtype=jnp.float32)
        totals = dict.fromkeys((*self.coefficients, "accuracy"), jnp.sum(weights))
        return Prepared(inputs, (ids[:, 1:], weights), {**totals, "tokens": read})

    def score(self, output: Any, targets: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """Sums of every term, and of correct predictions (`accuracy`, reported and not trained)."""
        labels, weights = targets
        loss, squares, correct = cross_entropy_sums(
            output.head_input,
            output.head,
            labels,
            weights,
            label_smoothing=self.label_smoothing,
            chunks=self.chunks,
            z_loss=self.z_loss > 0,
        )
        terms = {"next_token": loss, "z_loss": squares} if self.z_loss else {"next_token": loss}
        return {**terms, "accuracy": jax.lax.stop_gradient(correct)}
