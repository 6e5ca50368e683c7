"""A target given a source: translation, span corruption, the rest of a text given its beginning.

Sources: Vaswani et al. 2017 (teacher forcing, label smoothing), https://arxiv.org/abs/1706.03762; Raffel et al. 2020,
sections 3.1.4 and 3.2.1 (span corruption, prefix LM), https://arxiv.org/abs/1910.10683; Lester et al. 2021 (LM
adaptation: prefix LM after span corruption), https://arxiv.org/abs/2104.08691.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.protocols import Batch
from llm_jax.objectives import spans
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.objective import IGNORED, NATS_PER_TOKEN, Prepared, check_predicts, rows_that_count

TASKS = ("pairs", "spans", "prefix")


@dataclasses.dataclass(frozen=True)
class Seq2Seq:
    """Cross-entropy of every target token given the source and the target before it.

    Attributes:
      task: where source and target come from: `pairs` (the batch has both), `spans` (of a text, to be restored) or
        `prefix` (a text is cut at random).
      noise_density: spans: share of the tokens that is taken out.
      mean_span: spans: mean length, tokens.
      label_smoothing: mass moved from the label to all entries evenly.
      z_loss: coefficient of the mean squared log-partition.
      start_id: what the decoder reads first; -1 leaves it to `for_run`.
      vocab_size: spans: sentinels count down from its last entry; 0 leaves it to `for_run`.
      end_id: spans: what ends source and target, None for nothing (T5: `</s>`).
      chunks: parts that the length is cut into; only one part's logits exist at once. 0 leaves it to `for_run`.
    """

    tag: ClassVar[str] = "seq2seq"
    perplexity: ClassVar[bool] = True
    bits_per_byte: ClassVar[bool] = False
    loss_unit: ClassVar[str] = NATS_PER_TOKEN
    carry: ClassVar[bool] = False

    task: str = "pairs"
    noise_density: float = 0.15
    mean_span: float = 3.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    start_id: int = -1
    vocab_size: int = 0
    end_id: int | None = None
    chunks: int = 0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if not 0 < self.noise_density < 1 or self.mean_span < 1:
            raise ValueError(
                f"noise_density={self.noise_density} must lie in (0, 1), mean_span={self.mean_span} be at least 1"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.z_loss < 0 or self.chunks < 0:
            raise ValueError(f"z_loss={self.z_loss} and chunks={self.chunks} must not be negative")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Fills in what is left open.

        Raises:
          ValueError: if the model is not an encoder-decoder, or has another head.
        """
        del mask_id
        if model.reads != "source" or not getattr(model, "decoder", True):
            raise ValueError(f"objective Seq2Seq needs an encoder-decoder, not {type(model).__name__}")
        check_predicts(self, model)
        return dataclasses.replace(
            self,
            start_id=model.start_id if self.start_id < 0 else self.start_id,
            vocab_size=self.vocab_size or model.vocab_size,
            chunks=self.chunks or (4 if devices == 1 else 1),
        )

    def plain(self) -> Self:
        """The objective without regularisers, for evaluation."""
        return dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of next-token prediction and, where it is on, z-loss."""
        return {"next_token": 1.0, **({"z_loss": self.z_loss} if self.z_loss else {})}

    def _pair(self, batch: Batch, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Corrupts a text into (source, labels)."""
        ids = batch["input_ids"]
        if self.task == "pairs":
            return {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}, batch["labels"]
        if "attention_mask" in batch:
            raise ValueError(f"task={self.task!r} takes full rows of text, without an attention_mask")
        keys = jax.random.split(key, ids.shape[0])
        if self.task == "prefix":
            return jax.vmap(spans.cut)(keys, ids)

        def corrupt(key: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return spans.corrupt(key, row, self.noise_density, self.mean_span, self.vocab_size, self.end_id)

        source, labels = jax.vmap(corrupt)(keys, ids)
        return {"input_ids": source}, labels

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Makes source and labels, and shifts the labels for the decoder.

        Args:
          batch: pairs: `input_ids` and `attention_mask` `[B, S]`, `labels` `[B, T]` (-100 does not count). Otherwise
            `input_ids` `[B, T]`, full rows of text. Rows whose `loss_weights` are all zero do not count.
          key: spans and prefixes draw from it.

        Raises:
          ValueError: without `start_id`, or where spans do not fit.
        """
        if self.start_id < 0:
            raise ValueError("Seq2Seq needs start_id: set it, or call for_run with the model's config")
        source, labels = self._pair(batch, key)
        labels = jnp.where(rows_that_count(batch)[:, None], labels, IGNORED)
        weights = (labels != IGNORED).astype(jnp.float32)
        labels = jnp.where(labels == IGNORED, self.start_id, labels)
        first = jnp.full_like(labels[:, :1], self.start_id)
        inputs = {**source, "decoder_input_ids": jnp.concatenate([first, labels[:, :-1]], axis=1)}
        total = jnp.sum(weights)
        totals = dict.fromkeys((*self.coefficients, "accuracy"), total)
        read = jnp.sum(source["attention_mask"]) if "attention_mask" in source else source["input_ids"].size
        return Prepared(inputs, (labels, weights), {**totals, "tokens": jnp.float32(read) + total})

    def score(self, output: Any, targets: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """Sums of every term, and of correct predictions (`accuracy`, reported and not trained)."""
        labels, weights = targets
        loss, squares, correct = cross_entropy_sums(
            output.head_input,
            output.head,
            labels,
            weights,
            label_smoothing=self.label_smoothing,
            chunks=max(self.chunks, 1),
            z_loss=self.z_loss > 0,
        )
        terms = {"next_token": loss, "z_loss": squares} if self.z_loss else {"next_token": loss}
        return {**terms, "accuracy": jax.lax.stop_gradient(correct)}
