"""Host memory as the second floor of a device's: what lies there between steps, and where the update runs.

The optimizer's state (with the float32 master copy and the average) is read and written once a step, so it may lie in
pinned host memory. Either it is streamed through the device for the update (`optimizer`), or gradients go down, the
update is computed on the host, and new parameters come up (`update`): 4 bytes a parameter over the bus in half
precision, where streaming moves 24. With `parameters` those of layers stay down too: a layer comes up when it runs,
and its gradient goes down as soon as it is there, so the device holds a few layers, whatever the depth.

Sources: Ren et al. 2021 (ZeRO-Offload), https://arxiv.org/abs/2101.06840; Rajbhandari et al. 2021 (ZeRO-Infinity),
https://arxiv.org/abs/2104.07857.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jax.sharding import NamedSharding

from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Params, Tree
from llm_jax.nn.stack import Call, scanned

KINDS = ("optimizer", "update", "parameters", "disk")
ELEMENTWISE = ("sgd", "adam", "adamw", "lion")  # optimizers whose update a host can compute, or pieces can take
HOST = "pinned_host"
Space = jax.memory.Space
_computed: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)  # jax 0.11 has it under the shorter name
State: TypeAlias = tuple[Tree, Params, Params | None]  # the optimizer's, what learns, its average


class Signals(NamedTuple):
    """What an update takes beside gradients.

    Attributes:
      finite: whether the step counts.
      key: key of its random draws.
      shrink: factor of the gradients, None for 1.
    """

    finite: jax.Array
    key: jax.Array
    shrink: jax.Array | None


Update: TypeAlias = Callable[[State, Params, Signals], tuple[State, Params | None]]  # -> (new state, what computes)


def lies_on_host(x: Any) -> bool:
    """Whether an array of offloaded state goes to the host: counters stay."""
    return x.ndim > 0


def to_host(shardings: Tree, shapes: Tree) -> Tree:
    """The same shardings in host memory, but for scalars."""
    put = lambda s, x: s.with_memory_kind(HOST) if lies_on_host(x) else s
    return jax.tree.map(put, shardings, shapes, is_leaf=lambda s: isinstance(s, NamedSharding))


def is_hosted(path: str, x: Any) -> bool:
    """Whether a parameter goes to the host: matrices of layers. A TPU cuts no single row out of packed ones."""
    return paths.is_stacked(path) and x.ndim > 2


def layers_to_host(shardings: Tree, shapes: Tree) -> Tree:
    """The same shardings of parameters, with those of layers in host memory."""
    put = lambda path, s, x: s.with_memory_kind(HOST) if is_hosted(path, x) else s
    return paths.map_with_path(put, shardings, shapes)


def check_memory(device: jax.Device) -> None:
    """Refuses devices whose backend has no pinned host memory.

    Raises:
      ValueError: naming the kinds of memory that it has.
    """
    try:
        kinds = [m.kind for m in device.addressable_memories()]
    except Exception:  # a described device, which nobody can ask
        return
    if HOST not in kinds:
        has = ", ".join(kinds)
        raise ValueError(f"plan.offload needs {HOST} memory; {device.platform} has {has}: set plan.offload=()")


def to_device(tree: Tree) -> Tree:
    """Arrays where they can compute: what lies on the host comes up."""
    resident = lambda x: x.sharding.with_memory_kind("device")
    return jax.tree.map(lambda x: jax.device_put(x, resident(x)) if x.sharding.memory_kind == HOST else x, tree)


def cpu() -> jax.Device:
    """A CPU device beside those that compute.

    Raises:
      ValueError: if JAX was started without.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as e:
        first = jax.devices()[0].platform
        raise ValueError(f"plan.offload=parameters begins on a CPU: set JAX_PLATFORMS={first},cpu") from e


def _move(tree: Tree, space: Any) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _space(x: jax.Array) -> Any:
    return jax.typeof(x).memory_space


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` computed on the host, its results there."""
    there = Space.Host
    return _computed(function, compute_type="device_host", out_memory_spaces=there)(*_move(args, there))


def global_norm(grads: Params) -> jax.Array:
    """Norm of all gradients together; squares of those that lie on the host are summed there."""

    def squares(leaves: list[jax.Array]) -> list[jax.Array]:
        return [jnp.sum(weights.wide(x) ** 2) for x in leaves]

    leaves = jax.tree.leaves(grads)
    hosted = [_space(x) == Space.Host for x in leaves]
    here = iter(squares([x for x, below in zip(leaves, hosted, strict=True) if not below]))
    if not any(hosted):
        return jnp.sqrt(sum(here))
    # in one call: a TPU's compiler (libtpu 0.0.42.1) fails at a call for each
    there = on_host(squares, [x for x, below in zip(leaves, hosted, strict=True) if below])
    up = iter(_move(there, Space.Device))
    return jnp.sqrt(sum(next(up if below else here) for below in hosted))


def runner(execution: Execution) -> Callable[[Call], tuple[Tree, Tree]]:
    """A stack runner whose layers lie on the host: each comes up when it runs, in the backward pass again.

    Args:
      execution: how layers run; its `remat` keeps no parameters.
    """

    def run(call: Call) -> tuple[Tree, Tree]:
        if len(set(call.group_of)) != len(call.group_of):
            raise ValueError("plan.offload=parameters has no place for layers that share parameters: take update alone")

        def layer(p: Params, index: jax.Array, carry: Tree, inputs: Tree) -> tuple[Tree, Tree, Tree]:
            return call.layer(_move(p, Space.Device), index, carry, inputs, call.context)

        carry, outputs, sown = scanned(layer, call.params, None, call.group_of, call.carry, call.per_layer, execution)
        if sown:
            raise ValueError("plan.offload=parameters shows no intermediates: take update alone")
        return carry, outputs

    return run


@dataclasses.dataclass(frozen=True)
class HostUpdate:
    """Runs an update whose state lies on the host.

    Attributes:
      computes: whether the host computes it (`update`), or the device (`optimizer`).
      divide: pins gradients and parameters to the shardings of the optimizer's state, so that the host moves nothing
        between devices.
    """

    computes: bool
    divide: Callable[[Params], Params]

    def __call__(self, update: Update, state: State, grads: Params, signals: Signals) -> tuple[State, Params | None]:
        """`update(state, grads, signals)`, with the new state where the old one was.

        Args:
          update: a pure function.
          state: on host or device.
          grads: on the device.
          signals: see `Signals`.
        """
        spaces, of_params = jax.tree.map(_space, state), jax.tree.map(_space, grads)
        if not self.computes:
            state, grads = jax.lax.optimization_barrier((state, grads))  # state comes up when the layers are done
            new, moved = update(_move(state, Space.Device), grads, signals)
        else:
            opt_state, learn, average = state
            new, moved = on_host(update, (opt_state, self.divide(learn), average), self.divide(grads), signals)
            moved = None if moved is None else jax.tree.map(jax.device_put, moved, of_params)
        return jax.tree.map(jax.device_put, new, spaces), moved
