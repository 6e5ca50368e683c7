"""What a plan asks of a training step, as one object, and where the first state of a run is made."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn import realized
from llm_jax.nn.protocols import Axes, Params, Tree
from llm_jax.nn.stack import Call
from llm_jax.parallel import explicit
from llm_jax.parallel.memory import offload
from llm_jax.parallel.memory.disk import OnDisk
from llm_jax.parallel.memory.offload import HostUpdate, Signals, Update
from llm_jax.parallel.pipeline.schedules import Schedule
from llm_jax.parallel.plan import Plan
from llm_jax.parallel.rules import logical_axes

Runner = Callable[[Call], tuple[Any, Any]]  # runs a stack instead of its own loop
RunUpdate = Callable[[Update, Tree, Params, Signals], tuple[Tree, Params | None]]


class Division(NamedTuple):
    """Mesh axes of every parameter of a model.

    Attributes:
      computing: without ZeRO's division; None where nothing is divided.
      stored: between the turns of a pipeline of one stack, which gather a layer at a time; None where all lies as it
        computes.
      gradients: of its gradients; None for whole ones.
    """

    computing: Tree = None
    stored: Tree = None
    gradients: Tree = None


class Pipe(NamedTuple):
    """A pipeline.

    Attributes:
      mesh: with the axis `pipe`.
      schedule: what happens when.
      division: mesh axes of the parameters.
    """

    mesh: Mesh
    schedule: Schedule
    division: Division


def _unchanged(tree: Params) -> Params:
    return tree


def _update_here(update: Update, stored: Tree, grads: Params, signals: Signals) -> tuple[Tree, Params | None]:
    return update(stored, grads, signals)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a plan asks of a training step; the defaults are those of one device.

    Attributes:
      constrain_grads: pins the sharding of gradients, of realized parameters where there are realized nodes.
      constrain_stored: pins the sharding of gradients that were pulled back through realized nodes.
      run_update: calls the optimizer's update where its state lies: here, on the host or on disk.
      train_runner: runs the layers of a training step; None scans them.
      evaluate_runner: runs the layers of an evaluation; None scans them.
      wrap: makes parameters that gather themselves from those that compute.
      pipe: the pipeline that layers run through, None without.
    """

    constrain_grads: Callable[[Params], Params] = _unchanged
    constrain_stored: Callable[[Params], Params] = _unchanged
    run_update: RunUpdate = _update_here
    train_runner: Runner | None = None
    evaluate_runner: Runner | None = None
    wrap: Callable[[Params], Params] = _unchanged
    pipe: Pipe | None = None

    @property
    def on_disk(self) -> OnDisk | None:
        """The part of the state that lies in files, None without."""
        return self.run_update if isinstance(self.run_update, OnDisk) else None


def make(
    plan: Plan,
    stored: Params,
    computing: Params,
    axes: Axes,
    state: Any,
    init: Callable[[Any], Any],
    scratch: epath.PathLike | None = None,
) -> StepPlan:
    """What `plan` asks of the steps of one model.

    Args:
      plan: the plan.
      stored: abstract parameters as the state holds them.
      computing: abstract parameters as the model takes them, what is shared in every place.
      axes: logical axes of the parameters.
      state: the abstract training state.
      init: the optimizer's.
      scratch: local folder for state on disk.

    Raises:
      ValueError: for state on disk without a folder.
    """
    config, mesh, names = plan.config, plan.mesh, logical_axes(computing, axes)
    train_runner = evaluate_runner = None
    wrap: Callable[[Params], Params] = _unchanged
    if config.explicit:
        specs = plan.specs(computing, axes, True)
        train_runner = explicit.runner(mesh, specs, names, plan.execution())
        wrap = explicit.gathering(mesh, specs, names)
    elif config.seq > 1:  # the compiler would gather all positions' gradients for the rows of a table
        specs = plan.specs(computing, axes, config.zero >= 3)
        wrap = explicit.gathering(mesh, specs, names, P(explicit.ROWS, "seq"))
    if plan.keeps_parameters_on_host:
        train_runner = evaluate_runner = offload.runner(plan.execution())

    def pinned(params: Params) -> Callable[[Params], Params]:
        return _pin(plan.grad_shardings(params, axes)) if mesh.size > 1 else _unchanged

    return StepPlan(
        constrain_grads=pinned(realized.shapes(stored)),
        constrain_stored=pinned(stored),
        run_update=_make_run_update(plan, stored, axes, state, init, scratch),
        train_runner=train_runner,
        evaluate_runner=evaluate_runner,
        wrap=wrap,
        pipe=None if plan.schedule is None else Pipe(mesh, plan.schedule, _divide(plan, computing, axes)),
    )


def _make_run_update(
    plan: Plan, params: Params, axes: Axes, state: Any, init: Callable[[Any], Any], scratch: epath.PathLike | None
) -> RunUpdate:
    if "disk" in plan.config.offload:
        if scratch is None:
            raise ValueError("plan.offload=disk needs a folder, which only a run has: set plan.offload=()")
        return OnDisk(scratch, init, state)
    if plan.offloads:
        return HostUpdate("update" in plan.config.offload, _pin(plan.update_shardings(params, axes)))
    return _update_here


def _divide(plan: Plan, params: Params, axes: Axes) -> Division:
    return Division(
        computing=plan.specs(params, axes, False),
        stored=plan.staged(params, axes) if plan.config.zero >= 3 else None,
        gradients=plan.specs(params, axes, True) if plan.config.zero >= 2 else None,
    )


def compile_init(
    plan: Plan, init: Callable[[jax.Array, Any], Any], shardings: Any, on_disk: OnDisk | None
) -> Callable[[jax.Array, Any], Any]:
    """`init(key, given) -> state`, compiled, its results where `plan` keeps them; takes `given` over.

    Args:
      plan: the plan.
      init: makes the whole state.
      shardings: where the state goes.
      on_disk: takes what goes to files.
    """
    if on_disk is not None:
        begin = jax.jit(lambda key, given: on_disk.without(init(key, given), ("opt_state",)), donate_argnums=1)
        return lambda key, given: on_disk.take(begin(key, given))
    if plan.keeps_parameters_on_host:  # the host makes them: the device may not hold all of them
        host, make_there = offload.cpu(), jax.jit(init, donate_argnums=1)
        return lambda key, given: jax.device_put(make_there(jax.device_put(key, host), given), shardings)
    resident = jax.tree.map(lambda s: NamedSharding(s.mesh, s.spec), shardings)
    make_here = jax.jit(init, out_shardings=resident, donate_argnums=1)
    if plan.offloads:  # down from the device: what a program only passes on would stay there
        return lambda key, given: jax.device_put(make_here(key, given), shardings)
    return make_here


def given_shardings(plan: Plan, given: Params, axes: Axes) -> Any:
    """Where `compile_init`'s function expects the parameters that a run starts from: shardings, or one device."""
    return offload.cpu() if plan.keeps_parameters_on_host else plan.param_shardings(given, axes)


def _pin(shardings: Tree) -> Callable[[Params], Params]:
    """Constrains a tree's arrays to their shardings."""
    constrain = lambda g, s: None if g is None else jax.lax.with_sharding_constraint(g, s)
    return lambda tree: jax.tree.map(constrain, tree, shardings, is_leaf=lambda x: x is None)
