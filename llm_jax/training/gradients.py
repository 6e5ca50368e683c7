"""The gradient of a step's loss: of the whole batch, summed over micro-batches, or through a pipeline.

All three divide every term's score by its weight in the whole batch, so they agree.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.nn import realized, weights
from llm_jax.nn.protocols import Batch, Model, Params, Tree
from llm_jax.objectives.objective import Objective, Prepared, total_loss
from llm_jax.parallel.step_plan import Pipe
from llm_jax.training.pipelined import make_gradient

Scale = float | jax.Array
Scores = dict[str, jax.Array]  # one float32 number a term


class Gradients(NamedTuple):
    """What a backward pass gives.

    Attributes:
      loss: times the loss scale.
      scores: sums of every term.
      totals: weights of every term.
      grads: of what trains, times the loss scale.
      carry: what runs on to the next batch.
    """

    loss: jax.Array
    scores: Scores
    totals: Scores
    grads: Params
    carry: Tree


# (trainable, frozen, batch, key, loss scale, carry) -> Gradients
Gradient = Callable[[Params, Params, Batch, jax.Array, Scale, Tree], Gradients]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The loss of a micro-batch as a function of what trains.

    Attributes:
      model: Linen module.
      objective: see `objectives.objective`.
      compute: `(trainable, frozen) -> parameters` that compute: joined, cast, with what is shared in every place.
      wrap: the last change before they compute: unstacked layers, parameters that gather themselves.
      constrain_grads: pins the sharding of gradients.
    """

    model: Model
    objective: Objective
    compute: Callable[[Params, Params], Params]
    wrap: Callable[[Params], Params]
    constrain_grads: Callable[[Params], Params]

    def gradient(
        self,
        trainable: Params,
        frozen: Params,
        prepared: Prepared,
        totals: Scores,
        key: jax.Array,
        scale: Scale,
        carry: Tree,
    ) -> tuple[tuple[jax.Array, tuple[Scores, Tree]], Params]:
        """((loss times scale, (scores, next carry)), gradients), of one forward and backward pass."""

        def loss(trainable: Params) -> tuple[jax.Array, tuple[Scores, Tree]]:
            params = self.wrap(self.compute(trainable, frozen))
            inputs = prepared.inputs if carry is None else {**prepared.inputs, "cache": carry}
            out = self.model.apply({"params": params}, **inputs, train=True, rngs={"dropout": key})
            scores = self.objective.score(out, prepared.targets)
            after = None if carry is None else jax.tree.map(lambda x, c: x.astype(c.dtype), out.cache, carry)
            return total_loss(self.objective, scores, totals) * scale, (scores, jax.lax.stop_gradient(after))

        return jax.value_and_grad(loss, has_aux=True)(trainable)


def _micro_keys(key: jax.Array, index: int | jax.Array) -> jax.Array:
    """Two keys of a micro-batch: `prepare` draws from the first, dropout from the second."""
    return jax.random.split(jax.random.fold_in(key, index))


def _split(tree: Tree, count: int) -> Tree:
    """`[B, ...]` to `[count, B / count, ...]`; a micro-batch takes every `count`-th row."""
    split = lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(split, tree)


def _join(tree: Tree) -> Tree:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _prepare(objective: Objective, batch: Batch, key: jax.Array, count: int) -> tuple[Prepared, Scores]:
    """(all micro-batches, stacked; the weight of every term in all of them together)."""
    prepared = jax.vmap(lambda micro, index: objective.prepare(micro, _micro_keys(key, index)[0]))(
        _split(dict(batch), count), jnp.arange(count)
    )
    return prepared, jax.tree.map(lambda w: jnp.sum(w, axis=0), prepared.weights)


def whole(forward: Forward) -> Gradient:
    """The gradient of the whole batch at once."""

    def gradient(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array, scale: Scale, carry: Tree
    ) -> Gradients:
        prepare_key, dropout_key = _micro_keys(key, 0)
        prepared = forward.objective.prepare(batch, prepare_key)
        (loss, (scores, carry)), grads = forward.gradient(
            trainable, frozen, prepared, prepared.weights, dropout_key, scale, carry
        )
        return Gradients(loss, scores, prepared.weights, forward.constrain_grads(grads), carry)

    return gradient


def accumulated(forward: Forward, count: int) -> Gradient:
    """The same gradient, summed in float32 over `count` micro-batches that run one after the other."""
    constrain = forward.constrain_grads

    def gradient(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array, scale: Scale, carry: Tree
    ) -> Gradients:
        prepared, totals = _prepare(forward.objective, batch, key, count)

        def add(total: Tree, x: Tree) -> tuple[Tree, Tree]:
            index, micro, before = x
            (loss, (scores, after)), grads = forward.gradient(
                trainable, frozen, micro, totals, _micro_keys(key, index)[1], scale, before
            )
            grads = constrain(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            return jax.tree.map(jnp.add, total, (loss, scores, grads)), after

        zero = jnp.float32(0)
        zeros = constrain(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
        start = (zero, {name: zero for name in totals if name != "tokens"}, zeros)
        micros = (jnp.arange(count), prepared, _split(carry, count))
        (loss, scores, grads), carry = jax.lax.scan(add, start, micros)
        return Gradients(loss, scores, totals, grads, _join(carry))

    return gradient


def piped(forward: Forward, pipe: Pipe) -> Gradient:
    """The same gradient through a pipeline, whose micro-batches are those of accumulation."""
    count = pipe.schedule.micros

    def gradient(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array, scale: Scale, carry: Tree
    ) -> Gradients:
        prepared, totals = _prepare(forward.objective, batch, key, count)
        keys = jax.vmap(lambda index: _micro_keys(key, index)[1])(jnp.arange(count))
        run = make_gradient(forward.model, forward.objective, pipe, lambda t: weights.ready(forward.compute(t, frozen)))
        (loss, scores), grads = run(trainable, prepared, totals, keys, scale)
        return Gradients(loss, scores, totals, forward.constrain_grads(grads), carry)

    return gradient


def realizing(gradient: Gradient, constrain: Callable[[Params], Params]) -> Gradient:
    """The gradient of trees with realized nodes, which become parameters once a step; others pass unchanged.

    Args:
      gradient: of the realized parameters.
      constrain: pins the sharding of gradients of the stored ones.
    """

    def run(trainable: Params, frozen: Params, batch: Batch, key: jax.Array, scale: Scale, carry: Tree) -> Gradients:
        if not realized.has_any(trainable):
            return gradient(trainable, frozen, batch, key, scale, carry)
        learn, rest, pull_back = realized.split(trainable, frozen)
        found = gradient(learn, rest, batch, key, scale, carry)
        return found._replace(grads=constrain(pull_back(found.grads)))

    return run


def restart(carry: Tree, batch: Batch) -> Tree:
    """The carry, zero in the rows where a new text begins (`batch["continues"]` is False)."""
    if carry is None or "continues" not in batch:
        return carry
    rows = batch["continues"]
    reset = lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype)
    return jax.tree.map(reset, carry)
