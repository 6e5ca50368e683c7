"""Losses of the heads with labels: classes of texts and tokens, numbers, answer spans, choices.

Source: Devlin et al. 2019, section 4, https://arxiv.org/abs/1810.04805.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.protocols import Batch
from llm_jax.nn.weights import wide
from llm_jax.objectives.objective import IGNORED, Prepared, rows_that_count

KINDS = ("classification", "regression", "multi_label", "tokens", "span", "choice")
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Cross-entropy of labels (squared error for numbers, a logistic loss where several classes may hold).

    Attributes:
      kind: `classification` (labels `[B]`), `regression` (`[B]` or `[B, labels]` float), `multi_label`
        (`[B, labels]` of 0 and 1), `tokens` (`[B, T]`), `span` (`[B, 2]`, first and last position) or `choice` (`[B]`).
        An integer label of -100 does not count, nor does a span's end behind the row.
      label_smoothing: mass moved from the label to all classes evenly.
    """

    tag: ClassVar[str] = "labels"
    perplexity: ClassVar[bool] = False
    bits_per_byte: ClassVar[bool] = False
    carry: ClassVar[bool] = False

    kind: str = "classification"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the kind and the range."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.label_smoothing and self.kind in ("span", "regression", "multi_label"):
            raise ValueError(f"kind={self.kind!r} has no label smoothing")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Checks that the model's head gives what is scored.

        Raises:
          ValueError: if it does not.
        """
        del devices, mask_id
        head = getattr(model, "head", "none")
        if head != self.head:
            raise ValueError(f"objective Labels(kind={self.kind!r}) needs model.head={self.head!r}, not {head!r}")
        numbers = self.kind == "regression"
        if self.kind in ("classification", "regression") and (model.num_labels == 1) != numbers:
            raise ValueError(f"kind={self.kind!r} needs {'one label' if numbers else 'labels'}, not {model.labels}")
        return self

    def plain(self) -> Self:
        """The objective without smoothing, for evaluation."""
        return dataclasses.replace(self, label_smoothing=0.0)

    @property
    def head(self) -> str:
        """Which of `models.heads.HEADS` gives the logits."""
        return "classification" if self.kind in ("regression", "multi_label") else self.kind

    @property
    def loss_unit(self) -> str:
        """Name of the loss, as plots label it."""
        return "squared error" if self.kind == "regression" else "cross-entropy (nats per label)"

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the label, or of a span's start and end."""
        return {"start": 0.5, "end": 0.5} if self.kind == "span" else {"label": 1.0}

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Takes inputs and `labels` out of the batch; rows whose `loss_weights` are all zero do not count."""
        del key
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        labels = batch["labels"]
        counted = rows_that_count(batch).reshape(-1, *[1] * (labels.ndim - 1))
        counted = jnp.broadcast_to(counted, labels.shape)
        if self.kind == "span":
            inside = (labels >= 0) & (labels < batch["input_ids"].shape[-1])
            labels = jnp.where(inside & counted, labels, IGNORED)
        elif self.kind not in ("regression", "multi_label"):
            labels = jnp.where(counted, labels, IGNORED)
        if self.kind == "span":
            counts = jnp.sum(labels != IGNORED, axis=0, dtype=jnp.float32)
            totals = {"start": counts[0], "end": counts[1], "accuracy": jnp.sum(counts)}
        elif self.kind in ("regression", "multi_label"):
            totals = {"label": jnp.sum(counted, dtype=jnp.float32)}
            totals |= {"accuracy": totals["label"]} if self.kind == "multi_label" else {}
        else:
            total = jnp.sum(labels != IGNORED, dtype=jnp.float32)
            totals = {"label": total, "accuracy": total}
        if "attention_mask" in inputs:
            totals["tokens"] = jnp.sum(inputs["attention_mask"], dtype=jnp.float32)
        return Prepared(inputs, (labels, counted), totals)

    def _cross_entropy(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sums of the losses and of the correct predictions over all labels that count."""
        counts = labels != IGNORED
        logp = jax.nn.log_softmax(wide(logits), axis=-1)
        label_logp = jnp.take_along_axis(logp, jnp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
        loss = -(1 - self.label_smoothing) * label_logp - self.label_smoothing * jnp.mean(logp, axis=-1)
        right = (jnp.argmax(logits, axis=-1) == labels) & counts
        return jnp.sum(jnp.where(counts, loss, 0)), jnp.sum(right, dtype=loss.dtype)

    def score(self, output: Any, targets: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """Sums of every term, and of correct predictions where there are classes (`accuracy`, reported only)."""
        logits, (labels, counted) = output.logits, targets
        if self.kind in ("regression", "multi_label"):
            labels, counted = labels.reshape(logits.shape), counted.reshape(logits.shape)
        if self.kind == "regression":
            return {"label": jnp.sum(jnp.where(counted, jnp.square(logits - labels), 0))}
        if self.kind == "multi_label":
            right = jnp.sum(((logits > 0) == (labels > 0.5)) & counted, dtype=logits.dtype)
            loss = jax.nn.softplus(logits) - logits * labels
            return {"label": jnp.sum(jnp.where(counted, loss, 0)), "accuracy": right}
        if self.kind == "span":
            start, right_start = self._cross_entropy(logits[..., 0], labels[:, 0])
            end, right_end = self._cross_entropy(logits[..., 1], labels[:, 1])
            return {"start": start, "end": end, "accuracy": right_start + right_end}
        loss, right = self._cross_entropy(logits, labels)
        return {"label": loss, "accuracy": right}
