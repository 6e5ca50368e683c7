"""One optimizer step as a pure function: a gradient, then an update that happens only where it is finite."""

import dataclasses
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.nn import weights
from llm_jax.nn.protocols import Batch, Model, Params, Tree
from llm_jax.nn.realized import realize
from llm_jax.nn.stack import unstack
from llm_jax.nn.ties import Ties, expand
from llm_jax.objectives.objective import Objective
from llm_jax.parallel.memory.offload import Signals, Update, global_norm
from llm_jax.parallel.step_plan import StepPlan
from llm_jax.training import gradients
from llm_jax.training.precision import Precision, round_at_random
from llm_jax.training.state import TrainState
from llm_jax.training.trainable import combine, partition

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Sums = dict[str, jax.Array]  # by term


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
      ties: shared parameters, see `nn.ties`; the state holds their owners alone.
    """

    accumulation: int = 1
    clip_norm: float = 1.0
    ema: float = 0.0
    trainable: tuple[str, ...] | None = None
    precision: Precision = Precision()
    unroll: bool = False
    ties: Ties = dataclasses.field(default_factory=dict)


def _choose(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)


def _make_gradient(
    model: Model, objective: Objective, config: StepConfig, plan: StepPlan
) -> tuple[gradients.Gradient, int]:
    """(the gradient as the plan computes it, its micro-batches)."""

    def compute(trainable: Params, frozen: Params) -> Params:
        return expand(config.precision.cast(combine(trainable, frozen)), config.ties)

    def wrap(params: Params) -> Params:
        return plan.wrap(unstack(params) if config.unroll else params)

    forward = gradients.Forward(model, objective, compute, wrap, plan.constrain_grads)
    if plan.pipe is not None:
        gradient, micros = gradients.piped(forward, plan.pipe), plan.pipe.schedule.micros
    elif config.accumulation > 1:
        gradient, micros = gradients.accumulated(forward, config.accumulation), config.accumulation
    else:
        gradient, micros = gradients.whole(forward), 1
    return gradients.realizing(gradient, plan.constrain_stored), micros


def _make_update(tx: optax.GradientTransformation, config: StepConfig) -> Update:
    """`(stored, gradients, signals) -> (stored after one update, or as it was; the parameters that compute)`.

    `stored` is (optimizer state, what learns in float32 or rounded, moving average).
    """
    precision = config.precision

    def update(stored: Tree, grads: Params, signals: Signals) -> tuple[Tree, Params | None]:
        opt_state, learn, average = stored
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
        new = _choose(finite, (opt_state, wide, average), stored)
        return new, weights.cast(new[1], precision.dtype) if precision.keeps_master else None

    return update


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    config: StepConfig = StepConfig(),
    plan: StepPlan = StepPlan(),
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
      plan: how the step is spread over devices; one device by default.

    Raises:
      ValueError: when traced with a batch that does not divide by its micro-batches.
    """
    gradient, count = _make_gradient(model, objective, config, plan)
    update = _make_update(tx, config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % count:
            raise ValueError(f"a batch of {rows} rows does not divide into {count} micro-batches")
        key = jax.random.fold_in(state.key, state.step)
        trainable, frozen = partition(state.params, config.trainable)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        carry = gradients.restart(state.carry, batch)
        loss, scores, totals, grads, carry = gradient(trainable, frozen, batch, key, scale, carry)

        unscale = 1 / scale
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * unscale if state.loss_scale is not None else g, grads)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12)) if config.clip_norm else None

        learn = trainable if state.master is None else state.master
        signals = Signals(finite, jax.random.fold_in(key, np.uint32(2**32 - 1)), shrink)
        stored = (state.opt_state, learn, state.average)
        (opt_state, learn, average), computing = plan.run_update(update, stored, grads, signals)
        new = state.replace(
            step=state.step + 1,
            params=combine(learn if state.master is None else computing, frozen),
            opt_state=opt_state,
            master=None if state.master is None else learn,
            average=average,
            carry=_choose(finite, carry, state.carry),
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            loss_scale=None if state.loss_scale is None else state.loss_scale.update(finite),
        )
        targets = totals[next(iter(objective.coefficients))]
        metrics = {
            "loss": loss * unscale,
            "grad_norm": norm,
            "tokens": totals.get("tokens", targets),  # that the model read
            "targets": targets,  # that the loss is a mean of
            "bad_steps": new.bad_steps,
        }
        metrics |= {name: scores[name] / jnp.maximum(totals[name], 1e-8) for name in scores}
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
        return new, metrics

    return step


def make_eval_step(
    model: Model,
    objective: Objective,
    precision: Precision = Precision(),
    ties: Ties = types.MappingProxyType({}),
) -> Callable[[Params, Batch], tuple[Sums, Sums]]:
    """Builds `evaluate(params, batch) -> (score sums, weight sums)`, without dropout."""

    def evaluate(params: Params, batch: Batch) -> tuple[Sums, Sums]:
        params = expand(precision.cast(realize(params)), ties)
        prepared = objective.prepare(batch, jax.random.key(0))
        out = model.apply({"params": params}, **prepared.inputs)
        return objective.score(out, prepared.targets), prepared.weights

    return evaluate
