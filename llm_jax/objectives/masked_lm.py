"""Masked language modelling, with or without a second sentence: BERT, RoBERTa, ALBERT.

Sources: Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805; Liu et al. 2019 (dynamic masking, no pairs),
https://arxiv.org/abs/1907.11692; Lan et al. 2020 (sentence order), https://arxiv.org/abs/1909.11942.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.protocols import Batch
from llm_jax.nn.weights import wide
from llm_jax.objectives import masking
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.objective import NATS_PER_TOKEN, Prepared, rows_that_count

UNITS = ("tokens", "words", "spans")


class Targets(NamedTuple):
    """What `MaskedLM.score` needs.

    Attributes:
      positions_BK: positions of the chosen tokens, K a row; entries that were not needed have weight 0.
      labels_BK: the tokens that stood there.
      weights_BK: 0 or 1.
      pair_B: labels of the pairs, None without.
      pair_weights_B: 0 or 1.
    """

    positions_BK: jax.Array
    labels_BK: jax.Array
    weights_BK: jax.Array
    pair_B: jax.Array | None
    pair_weights_B: jax.Array | None


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Cross-entropy of chosen tokens given the rest, and of the pair's label where the batch has one.

    Attributes:
      rate: share of the tokens that is chosen.
      mask: share of those that the mask token replaces.
      random: share of those that any entry of the vocabulary replaces; the rest stays.
      unit: what is chosen: `tokens`, whole `words`, or `spans` of words.
      longest: words in a span.
      pair: coefficient of next-sentence or sentence-order prediction.
      mask_id: the mask token; -1 leaves it to `for_run`.
      vocab_size: entries that `random` draws from; 0 leaves it to `for_run`.
      label_smoothing: mass moved from the label to all entries evenly.
    """

    tag: ClassVar[str] = "masked_lm"
    perplexity: ClassVar[bool] = True
    bits_per_byte: ClassVar[bool] = False
    loss_unit: ClassVar[str] = NATS_PER_TOKEN
    carry: ClassVar[bool] = False

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    unit: str = "tokens"
    longest: int = 3
    pair: float = 1.0
    mask_id: int = -1
    vocab_size: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} is not one of {', '.join(UNITS)}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie in (0, 1)")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise ValueError(f"mask={self.mask} and random={self.random} must be shares of one whole")
        if self.longest < 1:
            raise ValueError(f"longest={self.longest} must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Fills in what is left open.

        Raises:
          ValueError: if the model has no masked-LM head, or the tokenizer no mask token.
        """
        del devices
        if model.reads != "both_sides" or model.head not in ("masked_lm", "pretraining"):
            raise ValueError("objective MaskedLM needs an encoder with model.head='masked_lm' or 'pretraining'")
        if self.mask_id < 0 and mask_id is None:
            raise ValueError("the tokenizer has no mask token ([MASK] or <mask>): set objective.mask_id")
        chosen = self.mask_id if mask_id is None or self.mask_id >= 0 else mask_id
        return dataclasses.replace(self, mask_id=chosen, vocab_size=self.vocab_size or model.vocab_size)

    def plain(self) -> Self:
        """The objective without regularisers, for evaluation."""
        return dataclasses.replace(self, label_smoothing=0.0)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients of the chosen tokens and, where it is on, of the pair's label."""
        return {"masked_token": 1.0, **({"pair": self.pair} if self.pair else {})}

    def _choose(
        self, key: jax.Array, words_T: jax.Array, maskable_T: jax.Array, ids_T: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        unit_key, choose_key, corrupt_key = jax.random.split(key, 3)
        units_T = masking.join(unit_key, words_T, self.longest) if self.unit == "spans" else words_T
        chosen_T = masking.choose(choose_key, units_T, maskable_T, self.rate)
        new_T = masking.corrupt(corrupt_key, ids_T, chosen_T, self.mask_id, self.vocab_size, self.mask, self.random)
        return chosen_T, new_T

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Chooses and replaces tokens.

        Args:
          batch: `input_ids` `[B, T]`; optional `attention_mask`, `token_type_ids`, `segment_ids` `[B, T]`;
            `maskable` `[B, T]` (tokens that may be chosen, all real ones by default); `words` `[B, T]` (number of
            each token's word within the row, needed by `words` and `spans`); `pair_labels` `[B]`; `mask_seed` `[B]`
            (static masking: the row's mask depends on this number alone); `loss_weights` (rows of zeros do not count).
          key: dynamic masking draws from it.

        Raises:
          ValueError: without `mask_id` or `vocab_size`, or without `words` where they are needed.
        """
        if self.mask_id < 0 or self.vocab_size < 1:
            raise ValueError("MaskedLM needs mask_id and vocab_size: set them, or take a tokenizer with a mask token")
        ids = batch["input_ids"]
        rows, length = ids.shape
        if self.unit != "tokens" and "words" not in batch:
            raise ValueError(f"unit={self.unit!r} needs `words` in the batch: the number of each token's word")
        alone = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
        words = alone if self.unit == "tokens" else batch["words"]
        real = jnp.ones(ids.shape, bool) if "attention_mask" not in batch else batch["attention_mask"].astype(bool)
        maskable = real if "maskable" not in batch else real & batch["maskable"].astype(bool)
        counted = rows_that_count(batch)
        if "mask_seed" in batch:
            keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(batch["mask_seed"])
        else:
            keys = jax.random.split(key, rows)
        chosen, corrupted = jax.vmap(self._choose)(keys, words, maskable, ids)
        size = min(length, masking.budget(length, self.rate) + (0 if self.unit == "tokens" else masking.WORD_SLACK))
        picked, positions = jax.lax.top_k(chosen.astype(jnp.float32), size)
        weights = picked * jnp.broadcast_to(counted[:, None], picked.shape)
        inputs = {k: batch[k] for k in ("attention_mask", "token_type_ids", "segment_ids") if k in batch}
        total = jnp.sum(weights)
        totals = {"masked_token": total, "accuracy": total, "tokens": jnp.sum(real, dtype=jnp.float32)}
        pair = pair_weights = None
        if self.pair and "pair_labels" in batch:
            pair, pair_weights = batch["pair_labels"], counted.astype(jnp.float32)
        if self.pair:
            totals["pair"] = totals["pair_accuracy"] = jnp.float32(0) if pair_weights is None else jnp.sum(pair_weights)
        targets = Targets(positions, jnp.take_along_axis(ids, positions, axis=1), weights, pair, pair_weights)
        return Prepared({"input_ids": corrupted, **inputs}, targets, totals)

    def score(self, output: Any, targets: Targets) -> dict[str, jax.Array]:
        """Sums of every term and of correct predictions; logits exist at the chosen positions only."""
        chosen_BKE = jnp.take_along_axis(output.head_input, targets.positions_BK[..., None], axis=1)
        loss, _, correct = cross_entropy_sums(
            chosen_BKE, output.head, targets.labels_BK, targets.weights_BK, label_smoothing=self.label_smoothing
        )
        scores = {"masked_token": loss, "accuracy": jax.lax.stop_gradient(correct)}
        if not self.pair:
            return scores
        if targets.pair_B is None or targets.pair_weights_B is None:
            return {**scores, "pair": jnp.zeros_like(loss), "pair_accuracy": jnp.zeros_like(loss)}
        if output.pair_logits is None:
            raise ValueError("pairs need model.head='pretraining'; or set objective.pair=0")
        logp = jax.nn.log_softmax(wide(output.pair_logits), axis=-1)
        label_logp = jnp.take_along_axis(logp, targets.pair_B[:, None], axis=1)[:, 0]
        right = (jnp.argmax(logp, axis=-1) == targets.pair_B) * targets.pair_weights_B
        return {**scores, "pair": -jnp.sum(label_logp * targets.pair_weights_B), "pair_accuracy": jnp.sum(right)}
