"""One optimizer step as a pure function: micro-batches, precision, clipping, the non-finite guard, averages."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.nn.ties import Ties, expand
from llm_jax.objectives.objective import Objective, total_loss
from llm_jax.parallel.memory.offload import Signals, global_norm
from llm_jax.parallel.pipeline.schedules import Schedule
from llm_jax.training.pipelined import Division, check_stages, make_gradient
from llm_jax.training.precision import Precision, round_at_random
from llm_jax.training.state import TrainState
from llm_jax.training.trainable import combine, partition

Step = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def _same(tree: Any) -> Any:
    return tree


def _keep(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Options of the step.

    Attributes:
      accumulation: micro-batches per step; rows of the batch must divide by it.
      clip_norm: global gradient norm is clipped here, 0 never.
      ema: decay of the moving average, 0 for none.
      trainable: patterns of what trains, None for everything.
      precision: compute dtype and master copy.
      unroll: run the layers unrolled; the state stays stacked.
    """

    accumulation: int = 1
    clip_norm: float = 1.0
    ema: float = 0.0
    trainable: tuple[str, ...] | None = None
    precision: Precision = Precision()
    unroll: bool = False


def make_train_step(
    model: Any,
    objective: Objective,
    tx: optax.GradientTransformation,
    config: StepConfig = StepConfig(),
    ties: Ties | None = None,
    constrain_grads: Callable[[Any], Any] = _same,
    pipe: tuple[Mesh, Schedule] | None = None,
    division: Division = Division(),
    wrap: Callable[[Any], Any] = _same,
    run_update: Callable[..., Any] = lambda update, *args: update(*args),
) -> Step:
    """Builds `step(state, batch) -> (state, metrics)`; jit it with the state donated.

    The loss is `sum(coefficient * score / weight)`, each term's weight totalled over all micro-batches before any
    backward pass, so accumulation gives the gradient of one large batch. A step whose loss or gradient is not finite
    changes nothing but `step`, `bad_steps` and the loss scale.

    Args:
      model: Linen module.
      objective: see `objectives.objective`.
      tx: optimizer without clipping.
      config: options.
      ties: shared parameters, expanded before every `apply`.
      constrain_grads: pins the sharding of gradients (ZeRO-2 and 3).
      pipe: mesh and schedule of a pipeline, whose micro-batches take the place of `accumulation`.
      division: of a pipeline: mesh axes of its parameters and gradients.
      wrap: of explicit ZeRO: parameters that gather themselves, from those that compute.
      run_update: runs the optimizer's update where its state lies (`parallel.offload`).

    Raises:
      ValueError: when traced with a batch that does not divide by its micro-batches.
    """
    precision = config.precision

    def loss_fn(trainable, frozen, prepared, totals, key, scale, carry):
        params = precision.cast(combine(trainable, frozen))
        params = expand(params, ties) if ties else params
        params = wrap(unstack(params) if config.unroll else params)
        inputs = prepared.inputs if carry is None else {**prepared.inputs, "cache": carry}
        out = model.apply({"params": params}, **inputs, train=True, rngs={"dropout": key})
        scores = objective.score(out, prepared.targets)
        after = None if carry is None else jax.tree.map(lambda x, c: x.astype(c.dtype), out.cache, carry)
        return total_loss(objective, scores, totals) * scale, (scores, jax.lax.stop_gradient(after))

    def update(kept, grads, signals):
        """(what is kept after one update, or as it was; the parameters that compute)."""
        opt_state, learn, average = kept
        finite, key, shrink = signals
        if shrink is not None:
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        wide = weights.cast(learn, jnp.float32) if precision.rounds else learn
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, wide)
        updates, opt_state = tx.update(grads, opt_state, wide)
        wide = optax.apply_updates(wide, updates)
        if average is not None:
            average = jax.tree.map(lambda a, p: config.ema * a + (1 - config.ema) * p, average, wide)
        if precision.rounds:
            leaves, tree = jax.tree.flatten(wide)
            keys = (jax.random.fold_in(key, i) for i in range(len(leaves)))
            wide = jax.tree.unflatten(tree, map(round_at_random, leaves, keys))
        new = _keep(finite, (opt_state, wide, average), kept)
        return new, weights.cast(new[1], precision.dtype) if precision.keeps_master else None

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        count = config.accumulation if pipe is None else pipe[1].micros
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % count:
            raise ValueError(f"a batch of {rows} rows does not divide into {count} micro-batches")
        key = jax.random.fold_in(state.key, state.step)
        trainable, frozen = partition(state.params, config.trainable)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        carry = state.carry
        if carry is not None and "continues" in batch:  # rows where something new begins
            reset = lambda x: jnp.where(batch["continues"].reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype)
            carry = jax.tree.map(reset, carry)

        def micro_keys(index):
            return jax.random.split(jax.random.fold_in(key, index))

        if count == 1 and pipe is None:
            prepare_key, dropout_key = micro_keys(0)
            prepared = objective.prepare(batch, prepare_key)
            totals = prepared.weights
            (loss, (scores, carry)), grads = gradient(trainable, frozen, prepared, totals, dropout_key, scale, carry)
            grads = constrain_grads(grads)
        else:
            split = lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)
            prepared = jax.vmap(lambda b, i: objective.prepare(b, micro_keys(i)[0]))(
                jax.tree.map(split, dict(batch)), jnp.arange(count)
            )
            totals = jax.tree.map(lambda w: jnp.sum(w, axis=0), prepared.weights)

        if pipe is not None:
            check_stages(state.params, pipe[1], carry is not None)
            keys = jax.vmap(lambda i: micro_keys(i)[1])(jnp.arange(count))
            form = lambda trainable: precision.cast(combine(trainable, frozen))
            piped = make_gradient(model, objective, *pipe, form, ties, division)
            (loss, scores), grads = piped(trainable, prepared, totals, keys, scale)
            grads = constrain_grads(grads)
        elif count > 1:

            def one(total, x):
                index, micro, before = x
                out = gradient(trainable, frozen, micro, totals, micro_keys(index)[1], scale, before)
                (loss, (scores, after)), grads = out
                grads = constrain_grads(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
                return jax.tree.map(jnp.add, total, (loss, scores, grads)), after

            zero = jnp.float32(0)
            zeros = constrain_grads(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
            start = (zero, {name: zero for name in totals if name != "tokens"}, zeros)
            xs = (jnp.arange(count), prepared, jax.tree.map(split, carry))
            (loss, scores, grads), carry = jax.lax.scan(one, start, xs)
            carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:]), carry)

        unscale = 1 / scale
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * unscale if state.loss_scale is not None else g, grads)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12)) if config.clip_norm else None

        learn = trainable if state.master is None else state.master
        kept = state.opt_state, learn, state.average
        signals = Signals(finite, jax.random.fold_in(key, np.uint32(2**32 - 1)), shrink)
        (opt_state, learn, average), moved = run_update(update, kept, grads, signals)
        new = state.replace(
            step=state.step + 1,
            params=combine(learn if state.master is None else moved, frozen),
            opt_state=opt_state,
            master=None if state.master is None else learn,
            average=average,
            carry=_keep(finite, carry, state.carry),
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            loss_scale=None if state.loss_scale is None else state.loss_scale.update(finite),
        )
        targets = totals[next(iter(objective.coefficients))]
        metrics = {
            "loss": loss * unscale,
            "grad_norm": norm,
            "tokens": totals.get("tokens", targets),  # that the model read
            "targets": targets,  # that the loss is a mean of
        }
        metrics["bad_steps"] = new.bad_steps
        metrics |= {name: scores[name] / jnp.maximum(totals[name], 1e-8) for name in scores}
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
        return new, metrics

    return step


def make_eval_step(
    model: Any, objective: Objective, precision: Precision = Precision(), ties: Ties | None = None
) -> Callable[[Any, Mapping[str, jax.Array]], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Builds `evaluate(params, batch) -> (score sums, weight sums)`, without dropout."""

    def evaluate(params, batch):
        params = precision.cast(params)
        params = expand(params, ties) if ties else params
        prepared = objective.prepare(batch, jax.random.key(0))
        out = model.apply({"params": params}, **prepared.inputs)
        return objective.score(out, prepared.targets), prepared.weights

    return evaluate
