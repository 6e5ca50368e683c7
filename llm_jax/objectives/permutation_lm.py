"""Permutation language modelling: some tokens are predicted one after the other in a random order.

Source: Yang et al. 2019, sections 2.2 and 2.3 (partial prediction: the last 1 / K of an order),
https://arxiv.org/abs/1906.08237; its code shows the tokens before those to all (`_local_perm` of `data_utils.py`).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from llm_jax.nn.protocols import Batch
from llm_jax.objectives import masking
from llm_jax.objectives.cross_entropy import cross_entropy_sums
from llm_jax.objectives.objective import NATS_PER_TOKEN, Prepared, rows_that_count

UNITS = ("tokens", "spans")


class Targets(NamedTuple):
    """Labels of the positions that the query stream predicts, `[B, K]`, and their weights (0 where unused)."""

    labels_BK: jax.Array
    weights_BK: jax.Array


def order(key: jax.Array, chosen_T: jax.Array) -> jax.Array:
    """`[T]` int32: rank of each chosen token in a random order, -1 for the tokens that all may see."""
    score_T = jnp.where(chosen_T, jax.random.uniform(key, chosen_T.shape), 2.0)
    rank_T = jnp.argsort(jnp.argsort(score_T))
    return jnp.where(chosen_T, rank_T, -1).astype(jnp.int32)


def hidden(order_T: jax.Array) -> jax.Array:
    """`[T, T]` bool: position i may not see position j, a target that does not come before it (nor itself)."""
    return (order_T[:, None] <= order_T[None, :]) & (order_T >= 0)[None, :]


@dataclasses.dataclass(frozen=True)
class PermutationLM:
    """Cross-entropy of chosen tokens, each given all that were not chosen and the chosen ones before it in the order.

    Attributes:
      rate: share of the tokens that is predicted; the paper's K = 6.
      unit: what is chosen: `tokens`, or `spans` of consecutive ones.
      longest: tokens in a span.
      carry: the memories run on from batch to batch.
      both_ways: half of the training rows run backwards, from the end of a text to its beginning.
    """

    tag: ClassVar[str] = "permutation_lm"
    perplexity: ClassVar[bool] = True
    bits_per_byte: ClassVar[bool] = False
    loss_unit: ClassVar[str] = NATS_PER_TOKEN

    rate: float = 1 / 6
    unit: str = "spans"
    longest: int = 5
    carry: bool = False
    both_ways: bool = False

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r} is not one of {', '.join(UNITS)}")
        if not 0 < self.rate < 1 or self.longest < 1:
            raise ValueError(f"rate={self.rate} must lie in (0, 1), longest={self.longest} be at least 1")

    def for_run(self, devices: int, model: Any, mask_id: int | None) -> Self:
        """Checks the model.

        Raises:
          ValueError: if the model is not an XLNet with a language-model head, or lacks the memory that is carried.
        """
        del devices, mask_id
        if model.reads != "any_order" or model.head != "lm":
            raise ValueError("objective PermutationLM needs an XLNetConfig with head='lm'")
        if self.carry and not model.memory_length:
            raise ValueError("objective.carry needs model.memory_length above 0")
        return self

    def plain(self) -> Self:
        """The objective without a carry, for evaluation."""
        return dataclasses.replace(self, carry=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficient of the only loss term."""
        return {"permuted_token": 1.0}

    def _choose(self, key: jax.Array, real_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        unit_key, choose_key, order_key = jax.random.split(key, 3)
        alone_T = jnp.arange(real_T.shape[0], dtype=jnp.int32)
        units_T = masking.join(unit_key, alone_T, self.longest) if self.unit == "spans" else alone_T
        chosen_T = masking.choose(choose_key, units_T, real_T, self.rate)
        return chosen_T, order(order_key, chosen_T)

    def prepare(self, batch: Batch, key: jax.Array) -> Prepared:
        """Chooses tokens and an order.

        Args:
          batch: `input_ids` `[B, T]`; optional `attention_mask`, `token_type_ids`, `backwards` `[B]`; rows whose
            `loss_weights` are all zero do not count.
          key: choice and order are drawn from it.
        """
        ids = batch["input_ids"]
        rows, length = ids.shape
        real = jnp.ones(ids.shape, bool) if "attention_mask" not in batch else batch["attention_mask"].astype(bool)
        chosen, ranks = jax.vmap(self._choose)(jax.random.split(key, rows), real)
        size = min(length, masking.budget(length, self.rate) + (0 if self.unit == "tokens" else masking.WORD_SLACK))
        picked, positions = jax.lax.top_k(chosen.astype(jnp.float32), size)
        weights = picked * jnp.broadcast_to(rows_that_count(batch)[:, None], picked.shape)
        inputs = {k: batch[k] for k in ("attention_mask", "token_type_ids", "backwards") if k in batch}
        inputs |= {"input_ids": ids, "perm_mask": jax.vmap(hidden)(ranks), "target_positions": positions}
        total = jnp.sum(weights)
        totals = {"permuted_token": total, "accuracy": total, "tokens": jnp.sum(real, dtype=jnp.float32)}
        return Prepared(inputs, Targets(jnp.take_along_axis(ids, positions, axis=1), weights), totals)

    def score(self, output: Any, targets: Targets) -> dict[str, jax.Array]:
        """Sums of the term and of correct predictions (`accuracy`, reported and not trained)."""
        loss, _, correct = cross_entropy_sums(
            output.head_input, output.head, targets.labels_BK, targets.weights_BK, z_loss=False
        )
        return {"permuted_token": loss, "accuracy": jax.lax.stop_gradient(correct)}
