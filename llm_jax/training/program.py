"""What a run compiles: its plan, model, initial state and steps, on real devices or on those of a described machine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths, weights
from llm_jax.objectives.objective import Objective
from llm_jax.parallel import explicit, offload
from llm_jax.parallel.disk import OnDisk
from llm_jax.parallel.offload import ELEMENTWISE, HostUpdate
from llm_jax.parallel.plan import Plan
from llm_jax.training import flops
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.pipelined import check_stages
from llm_jax.training.precision import Precision
from llm_jax.training.rows import carries
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
      flops_per_token: see `flops.flops_per_token`.
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
    flops_per_token: float
    on_disk: OnDisk | None


def options_of(given: Sequence[str]) -> dict[str, Any] | None:
    """Options of the compiler from `name=value`, where true and false are no words; None without any."""
    words = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in given)
    return {name: words.get(value.lower(), value) for name, value in pairs} or None


def build(
    config: Any,
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
      ValueError: where plan, batch, model, objective or optimizer do not fit together.
    """
    c = config.training
    plan.check_batch(c.batch_size, c.accumulation, c.sequence_length)
    objective = config.objective.for_run(plan.mesh.size, config.model, mask_id)
    model = config.model.make(plan.execution())
    tx = make_optimizer(config.optimizer, c.steps)
    precision = Precision(config.plan.precision, config.plan.master)
    example = jax.ShapeDtypeStruct((plan.batch_divisor, c.sequence_length), np.int32)
    boxed = jax.eval_shape(lambda key, ids: model.init(key, ids)["params"], jax.random.key(0), example)
    params, axes = weights.split_axes(boxed)
    given = None if given is None else jax.eval_shape(lambda p: p, given)
    params = params if given is None else jax.eval_shape(adapt, given)

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

    def pin(shardings: Any) -> Callable[[Any], Any]:
        one = lambda g, s: None if g is None else jax.lax.with_sharding_constraint(g, s)
        return lambda tree: jax.tree.map(one, tree, shardings, is_leaf=lambda x: x is None)

    keep_grads = pin(plan.grad_shardings(params, axes))
    options = StepConfig(c.accumulation, config.optimizer.clip_norm, c.ema, c.trainable, precision, config.plan.unroll)
    keep_grads = keep_grads if plan.mesh.size > 1 else lambda g: g
    pipe = None if plan.schedule is None else (plan.mesh, plan.schedule)
    kept = plan.specs(params, axes, True) if config.plan.zero >= 2 and pipe else None
    gather = lambda tree: plan.gather(tree, axes)
    where: dict[str, Any] = {}
    on_disk = None
    kinds = set(config.plan.offload) & {"update", "disk"}
    if kinds and config.optimizer.name not in ELEMENTWISE:
        raise ValueError(
            f"plan.offload={kinds.pop()} computes elementwise optimizers on the host or by pieces "
            f"({', '.join(ELEMENTWISE)}), not {config.optimizer.name}: set plan.offload=('optimizer',)"
        )
    if "disk" in config.plan.offload:
        if scratch is None:
            raise ValueError("plan.offload=disk needs a folder, which only a run has: set plan.offload=()")
        on_disk = OnDisk(scratch, tx.init, shapes)
        where = {"run_update": on_disk}
    elif config.plan.offload:
        divide = pin(plan.update_shardings(params, axes))
        where = {"run_update": HostUpdate("update" in config.plan.offload, divide)}
    trained = model
    if "parameters" in config.plan.offload:
        if c.accumulation > 1:
            raise ValueError(
                f"training.accumulation={c.accumulation} with plan.offload=parameters: set it to 1; "
                "plan.remat=offload:block makes room for larger batches"
            )
        execution = plan.execution()
        trained = config.model.make(dataclasses.replace(execution, stack_runner=offload.runner(execution)))
    evaluated = trained
    if config.plan.seq > 1:  # the compiler would gather all positions' gradients for the rows of a table
        stored = plan.specs(params, axes, config.plan.zero >= 3)
        where["wrap"] = explicit.gathering(plan.mesh, stored, P(explicit.ROWS, "seq"))
    if config.plan.explicit:
        execution = plan.execution()
        stored = plan.specs(params, axes, True)
        run, where["wrap"] = explicit.runner(plan.mesh, stored, execution), explicit.gathering(plan.mesh, stored)
        trained = config.model.make(dataclasses.replace(execution, stack_runner=run))
    step = make_train_step(
        trained, objective, tx, options, constrain_grads=keep_grads, pipe=pipe, gather=gather, divided=kept, **where
    )
    resident = jax.tree.map(lambda s: NamedSharding(s.mesh, s.spec), shardings)
    places: Any = None if given is None else plan.param_shardings(given, axes)
    first: Any = jax.jit(init, out_shardings=resident, donate_argnums=1)
    if on_disk is not None:
        shardings = jax.tree.map(lambda s: NamedSharding(s.mesh, P()), shardings)  # of one device, and of empty arrays
        begin = jax.jit(lambda key, given: on_disk.without(init(key, given), ("opt_state",)), donate_argnums=1)
        first = lambda key, given: on_disk.take(begin(key, given))
    elif "parameters" in config.plan.offload:  # made by the host: the device may not hold all of it
        places, on_cpu = offload.cpu(), jax.jit(init, donate_argnums=1)
        first = lambda key, given: jax.device_put(on_cpu(jax.device_put(key, places), given), shardings)
    elif config.plan.offload:  # down from the device: what a program only passes on would stay there
        on_device = first
        first = lambda key, given: jax.device_put(on_device(key, given), shardings)
    width = flops.attention_dim(config.model)
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
        evaluate=jax.jit(make_eval_step(evaluated, objective.plain(), precision)),
        flops_per_token=flops.flops_per_token(params, config.model.num_layers, c.sequence_length, width),
        on_disk=on_disk,
    )
