"""What a run compiles: its plan, model, initial state and steps, on real devices or on those of a described machine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths, ports, weights
from llm_jax.objectives.objective import Objective
from llm_jax.parallel import explicit
from llm_jax.parallel.memory import offload
from llm_jax.parallel.memory.disk import OnDisk
from llm_jax.parallel.memory.offload import ELEMENTWISE, HostUpdate
from llm_jax.parallel.plan import Plan
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.pipelined import Division, check_stages
from llm_jax.training.precision import Precision
from llm_jax.training.rows import carries
from llm_jax.training.run_config import RunConfig
from llm_jax.training.state import TrainState, init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step


class Program(NamedTuple):
    """A run without its data.

    Attributes:
      objective: as it trains.
      params: abstract parameters.
      axes: their logical axes.
      given: abstract parameters that the run starts from, None for fresh ones.
      places: device or shardings that `init` expects them on.
      init: `(key, given) -> state`, compiled; takes `given` over.
      shapes: the abstract state.
      shardings: of the state.
      step: jitted `(state, batch) -> (state, metrics)`; takes the state over.
      evaluate: jitted `(params, batch) -> (score sums, weight sums)`.
      on_disk: where the rest of the state lies with `plan.offload=disk`; what `init` returns and `step` takes is
        without it.
    """

    objective: Objective
    params: Any
    axes: Any
    given: Any
    places: Any
    init: Any
    shapes: TrainState
    shardings: Any
    step: Any
    evaluate: Any
    on_disk: OnDisk | None


def options_of(given: Sequence[str]) -> dict[str, Any] | None:
    """Options of the compiler from `name=value`, where true and false are no words; None without any."""
    words = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in given)
    return {name: words.get(value.lower(), value) for name, value in pairs} or None


def _pin(shardings: Any) -> Callable[[Any], Any]:
    """Constrains a tree's arrays to their shardings."""
    one = lambda g, s: None if g is None else jax.lax.with_sharding_constraint(g, s)
    return lambda tree: jax.tree.map(one, tree, shardings, is_leaf=lambda x: x is None)


def _offloaded_update(
    config: RunConfig, plan: Plan, shapes: TrainState, axes: Any, tx: Any, scratch: epath.PathLike | None
) -> OnDisk | HostUpdate | None:
    """What runs the optimizer's update where its state lies; None where that is the device."""
    kinds = set(config.plan.offload) & {"update", "disk"}
    if kinds and config.optimizer.name not in ELEMENTWISE:
        raise ValueError(
            f"plan.offload={kinds.pop()} computes elementwise optimizers on the host or by pieces "
            f"({', '.join(ELEMENTWISE)}), not {config.optimizer.name}: set plan.offload=('optimizer',)"
        )
    if "disk" in config.plan.offload:
        if scratch is None:
            raise ValueError("plan.offload=disk needs a folder, which only a run has: set plan.offload=()")
        return OnDisk(scratch, tx.init, shapes)
    if config.plan.offload:
        return HostUpdate("update" in config.plan.offload, _pin(plan.update_shardings(shapes.params, axes)))
    return None


class _Runners(NamedTuple):
    """Who runs the layers where they are not simply scanned.

    Attributes:
      train: a stack runner.
      evaluate: another.
      wrap: see `make_train_step`.
    """

    train: Any = None
    evaluate: Any = None
    wrap: Any = None


def _runners(config: RunConfig, plan: Plan, params: Any, axes: Any) -> _Runners:
    """What host memory, explicit ZeRO and rings ask for."""
    own, execution = config.plan, plan.execution()
    if own.explicit:
        stored = plan.specs(params, axes, True)
        return _Runners(train=explicit.runner(plan.mesh, stored, execution), wrap=explicit.gathering(plan.mesh, stored))
    wrap = run = None
    if own.seq > 1:  # the compiler would gather all positions' gradients for the rows of a table
        stored = plan.specs(params, axes, own.zero >= 3)
        wrap = explicit.gathering(plan.mesh, stored, P(explicit.ROWS, "seq"))
    if "parameters" in own.offload:
        if config.training.accumulation > 1:
            raise ValueError(
                f"training.accumulation={config.training.accumulation} with plan.offload=parameters: set it to 1; "
                "plan.remat=offload:block makes room for larger batches"
            )
        run = offload.runner(execution)
    return _Runners(run, run, wrap)


def _first_state(
    init: Any, config: RunConfig, shardings: Any, places: Any, on_disk: OnDisk | None
) -> tuple[Any, Any, Any]:
    """(compiled `init`, shardings of what it returns, where it expects given parameters)."""
    resident = jax.tree.map(lambda s: NamedSharding(s.mesh, s.spec), shardings)
    on_device: Any = jax.jit(init, out_shardings=resident, donate_argnums=1)
    if on_disk is not None:
        shardings = jax.tree.map(lambda s: NamedSharding(s.mesh, P()), shardings)  # of one device, and of empty arrays
        begin = jax.jit(lambda key, given: on_disk.without(init(key, given), ("opt_state",)), donate_argnums=1)
        return lambda key, given: on_disk.take(begin(key, given)), shardings, places
    if "parameters" in config.plan.offload:  # made by the host: the device may not hold all of it
        host, on_host = offload.cpu(), jax.jit(init, donate_argnums=1)
        first = lambda key, given: jax.device_put(on_host(jax.device_put(key, host), given), shardings)
        return first, shardings, host
    if config.plan.offload:  # down from the device: what a program only passes on would stay there
        return lambda key, given: jax.device_put(on_device(key, given), shardings), shardings, places
    return on_device, shardings, places


def optimizer_of(config: RunConfig) -> OptimizerConfig:
    """The run's optimizer with what it takes from the model: the width in Noam's formula."""
    own = config.optimizer
    if own.schedule != "noam" or own.noam_dim is not None:
        return own
    return dataclasses.replace(own, noam_dim=config.model.model_dim)


def build(
    config: RunConfig,
    plan: Plan,
    mask_id: int | None,
    given: Any = None,
    adapt: Callable[[Any], Any] = lambda params: params,
    scratch: epath.PathLike | None = None,
) -> Program:
    """Everything up to the first compilation.

    Args:
      config: a `RunConfig`.
      plan: of the same config, on its devices.
      mask_id: the tokenizer's mask, None without.
      given: parameters to start from (abstract will do).
      adapt: see `run.train`.
      scratch: local folder for state on disk.

    Raises:
      ValueError: where plan, batch, model, objective or optimizer do not fit together, or naming a parameter that no
        module reads.
    """
    c = config.training
    plan.check_batch(c.batch_size, c.accumulation, c.sequence_length)
    objective = config.objective.for_run(plan.mesh.size, config.model, mask_id)
    model = config.model.make(plan.execution())
    tx = make_optimizer(optimizer_of(config), c.steps)
    precision = Precision(config.plan.precision, config.plan.master)
    example = jax.ShapeDtypeStruct((plan.batch_divisor, c.sequence_length), np.int32)
    boxed = jax.eval_shape(lambda key, ids: model.init(key, ids)["params"], jax.random.key(0), example)
    params, axes = weights.split_axes(boxed)
    given = None if given is None else jax.eval_shape(lambda p: p, given)
    declared, params = params, params if given is None else jax.eval_shape(adapt, given)
    ports.check(declared, params)

    if plan.schedule is not None:  # said here, before anything is compiled
        check_stages(params, plan.schedule, carries(config.objective))

    def init(key: jax.Array, given: Any) -> TrainState:
        init_key, step_key = jax.random.split(key)
        if given is None:
            fresh = weights.split_axes(model.init(init_key, np.zeros(example.shape, example.dtype))["params"])[0]
        else:
            fresh = adapt(given)
        carry = config.model.init_carry(c.batch_size) if carries(config.objective) else None
        return init_state(fresh, tx, step_key, precision, c.trainable, c.ema > 0, carry)

    if config.optimizer.decay != OptimizerConfig.decay:  # the default names what most trees have, not all
        paths.select([p for p, _ in paths.flatten(params, weights.is_node)], config.optimizer.decay)

    shapes = jax.eval_shape(init, jax.random.key(c.seed), given)
    shardings = plan.state_shardings(shapes, axes)

    options = StepConfig(c.accumulation, config.optimizer.clip_norm, c.ema, c.trainable, precision, config.plan.unroll)
    by_plan: dict[str, Any] = {}
    if plan.mesh.size > 1:
        by_plan["constrain_grads"] = _pin(plan.grad_shardings(params, axes))
    if plan.schedule is not None:
        held = plan.staged(params, axes) if config.plan.zero >= 3 else None
        kept = plan.specs(params, axes, True) if config.plan.zero >= 2 else None
        by_plan.update(pipe=(plan.mesh, plan.schedule), division=Division(plan.specs(params, axes, False), held, kept))
    update = _offloaded_update(config, plan, shapes, axes, tx, scratch)
    if update is not None:
        by_plan["run_update"] = update
    on_disk = update if isinstance(update, OnDisk) else None
    runners = _runners(config, plan, params, axes)
    if runners.wrap is not None:
        by_plan["wrap"] = runners.wrap
    with_runner = lambda run: (
        config.model.make(dataclasses.replace(plan.execution(), stack_runner=run)) if run else model
    )
    step = make_train_step(with_runner(runners.train), objective, tx, options, **by_plan)
    places = None if given is None else plan.param_shardings(given, axes)
    first, shardings, places = _first_state(init, config, shardings, places, on_disk)
    return Program(
        objective=objective,
        params=params,
        axes=axes,
        given=given,
        places=places,
        init=first,
        shapes=shapes,
        shardings=shardings,
        step=jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options_of(config.plan.compiler)
        ),
        evaluate=jax.jit(make_eval_step(with_runner(runners.evaluate), objective.plain(), precision)),
        on_disk=on_disk,
    )
