"""What a run compiles: its plan, model, initial state and steps, on real devices or on those of a described machine."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.nn import paths, ports, weights
from llm_jax.nn.protocols import Axes, Params
from llm_jax.nn.realized import has_any, realize
from llm_jax.nn.ties import Ties, expand, parse, tie
from llm_jax.objectives.objective import Objective
from llm_jax.parallel import step_plan
from llm_jax.parallel.memory.disk import OnDisk
from llm_jax.parallel.plan import Plan
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.pipelined import check_stages
from llm_jax.training.precision import Precision
from llm_jax.training.run_config import RunConfig
from llm_jax.training.state import TrainState, init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step


class Program(NamedTuple):
    """A run without its data.

    Attributes:
      objective: as it trains.
      terms: coefficients of the loss that evaluations show, without what only training adds.
      params: abstract parameters, as the state holds them.
      axes: logical axes of the model's parameters.
      ties: shared parameters, see `nn.ties`.
      ahead: what given parameters become before they are placed.
      given_placement: device or shardings that `init` expects given parameters on; None for fresh ones.
      init: `(key, given) -> state`, compiled; takes `given` over.
      shapes: the abstract state.
      shardings: of the state that `init` returns and `step` takes.
      step: jitted; takes the state over.
      evaluate: jitted `(params, batch) -> (score sums, weight sums)`.
      on_disk: where the rest of the state lies with `plan.offload=disk`; what `init` returns and `step` takes is
        without it.
    """

    objective: Objective
    terms: Mapping[str, float]
    params: Params
    axes: Axes
    ties: Ties
    ahead: Callable[[Params], Params]
    given_placement: Any
    init: Callable[[jax.Array, Params | None], TrainState]
    shapes: TrainState
    shardings: Any
    step: Any  # jax.stages.Wrapped: (state, batch) -> (state, metrics)
    evaluate: Any
    on_disk: OnDisk | None


def options_of(given: Sequence[str]) -> dict[str, Any] | None:
    """Options of the compiler from `name=value`, where true and false are not words; None without any."""
    words = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in given)
    return {name: words.get(value.lower(), value) for name, value in pairs} or None


def resident(state: TrainState, on_disk: OnDisk | None) -> TrainState:
    """The state with its moving average in memory; for a moment, where no gradients are."""
    if on_disk is None or state.average is None:
        return state
    files = on_disk.arrays
    read = lambda path, x: jnp.array(files[path]) if path in files else x
    average = paths.map_with_path(lambda path, x: read(f"average/{path}", x), state.average)
    return state.replace(average=average)


def optimizer_of(config: RunConfig) -> OptimizerConfig:
    """The run's optimizer with what it takes from the model: the width in Noam's formula."""
    optimizer = config.optimizer
    if optimizer.schedule != "noam" or optimizer.noam_dim is not None:
        return optimizer
    return dataclasses.replace(optimizer, noam_dim=config.model.model_dim)


def build(
    config: RunConfig,
    plan: Plan,
    mask_id: int | None,
    given: Params | None = None,
    adapt: Callable[[Params], Params] = lambda params: params,
    scratch: epath.PathLike | None = None,
    ahead: bool = False,
) -> Program:
    """Everything up to the first compilation.

    Args:
      config: a `RunConfig`.
      plan: of the same config, on its devices.
      mask_id: the tokenizer's mask, None without.
      given: parameters to start from (abstract will do).
      adapt: see `run.train`.
      scratch: local folder for state on disk.
      ahead: `adapt` runs before the parameters are placed, and not inside of `init`.

    Raises:
      ValueError: where plan, batch, model, objective or optimizer do not fit together, or naming a parameter that no
        module reads.
    """
    c, ties = config.training, parse(config.ties)
    plan.check_batch(c.batch_size, c.accumulation, c.sequence_length)
    plan.check_optimizer(config.optimizer.name, config.optimizer.layer_decay)
    if ties and plan.keeps_parameters_on_host:
        raise ValueError("plan.offload=parameters has no place for shared parameters (ties): take update alone")
    objective = config.objective.for_run(plan.mesh.size, config.model, mask_id)
    model = config.model.make(plan.execution())
    precision = Precision(config.plan.precision, config.plan.master)
    ids = np.zeros((plan.batch_divisor, c.sequence_length), np.int32)
    fresh = lambda key: model.init(key, ids)["params"]
    declared, axes = weights.split_axes(jax.eval_shape(fresh, jax.random.key(0)))
    same = lambda params: params
    before, adapt = (adapt, same) if ahead else (same, adapt)
    given = None if given is None else jax.eval_shape(before, given)
    first = lambda key, given: tie(weights.split_axes(fresh(key))[0] if given is None else adapt(given), ties)
    params = jax.eval_shape(first, jax.random.key(0), given)
    if has_any(params) and plan.keeps_parameters_on_host:
        raise ValueError("plan.offload=parameters has no place for realized nodes (nn.realized): take update alone")
    computing = jax.eval_shape(lambda p: expand(realize(p), ties), params)
    ports.check(declared, computing)
    if plan.schedule is not None:  # said here, before anything is compiled
        check_stages(computing, plan.schedule, config.objective.carry)
        computing = jax.eval_shape(weights.ready, computing)
    if config.optimizer.decay != OptimizerConfig.decay:  # the default names what most trees have, not all
        paths.select([p for p, _ in paths.flatten(params, weights.is_node)], config.optimizer.decay)

    tx = make_optimizer(optimizer_of(config), c.steps, params, c.trainable)

    def init(key: jax.Array, given: Params | None) -> TrainState:
        init_key, step_key = jax.random.split(key)
        carry = config.model.init_carry(c.batch_size) if config.objective.carry else None
        return init_state(first(init_key, given), tx, step_key, precision, c.trainable, c.ema > 0, carry)

    shapes = jax.eval_shape(init, jax.random.key(c.seed), given)
    shardings = plan.state_shardings(shapes, axes)
    spread = step_plan.make(plan, params, computing, axes, shapes, tx.init, scratch)
    options = StepConfig(
        accumulation=c.accumulation,
        clip_norm=config.optimizer.clip_norm,
        ema=c.ema,
        trainable=c.trainable,
        precision=precision,
        unroll=config.plan.unroll,
        ties=ties,
    )
    model_with = lambda runner: config.model.make(plan.execution(stack_runner=runner))
    step = make_train_step(model_with(spread.train_runner), objective, tx, options, spread)
    evaluate = make_eval_step(model_with(spread.evaluate_runner), objective.plain(), precision, ties)
    return Program(
        objective=objective,
        terms=objective.plain().coefficients,
        params=params,
        axes=axes,
        ties=ties,
        ahead=before,
        given_placement=None if given is None else step_plan.given_shardings(plan, given, axes),
        init=step_plan.compile_init(plan, init, shardings, spread.on_disk),
        shapes=shapes,
        shardings=shardings,
        step=jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options_of(config.plan.compiler)
        ),
        evaluate=jax.jit(evaluate),
        on_disk=spread.on_disk,
    )
