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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import compute_on
from jax.sharding import NamedSharding

from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import Call, scanned

KINDS = ("optimizer", "update", "parameters", "disk")
ELEMENTWISE = ("sgd", "adam", "adamw", "lion")  # optimizers whose update a host can compute, or pieces can take
HOST = "pinned_host"
_computed: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)  # jax 0.11 has it under the shorter name
Update = Callable[[Any, Any, Any], Any]  # (kept, gradients, signals) -> (new, moved)


class Signals(NamedTuple):
    """What an update hears beside gradients.

    Attributes:
      finite: whether the step counts.
      key: of what it draws.
      shrink: factor of the gradients, None for one.
    """

    finite: jax.Array
    key: jax.Array
    shrink: jax.Array | None


def lies_on_host(x: Any) -> bool:
    """Whether an array of offloaded state goes to the host: counters stay."""
    return x.ndim > 0


def to_host(shardings: Any, shapes: Any) -> Any:
    """The same shardings in host memory, but for scalars."""
    put = lambda s, x: s.with_memory_kind(HOST) if lies_on_host(x) else s
    return jax.tree.map(put, shardings, shapes, is_leaf=lambda s: isinstance(s, NamedSharding))


def is_hosted(path: str, x: Any) -> bool:
    """Whether a parameter goes to the host: matrices of layers. A TPU cuts no single row out of packed ones."""
    return paths.is_stacked(path) and x.ndim > 2


def layers_to_host(shardings: Any, shapes: Any) -> Any:
    """The same shardings of parameters, those of layers in host memory."""
    put = lambda path, s, x: s.with_memory_kind(HOST) if is_hosted(path, x) else s
    return paths.map_with_path(put, shardings, shapes)


def check_memory(device: Any) -> None:
    """Refuses devices whose backend has no pinned host memory.

    Raises:
      ValueError: naming what it has.
    """
    try:
        kinds = [m.kind for m in device.addressable_memories()]
    except Exception:  # a described device, which nobody can ask
        return
    if HOST not in kinds:
        has = ", ".join(kinds)
        raise ValueError(f"plan.offload needs {HOST} memory; {device.platform} has {has}: set plan.offload=()")


def to_device(tree: Any) -> Any:
    """Arrays where they can compute: what lies on the host comes up."""
    resident = lambda x: x.sharding.with_memory_kind("device")
    return jax.tree.map(lambda x: jax.device_put(x, resident(x)) if x.sharding.memory_kind == HOST else x, tree)


def cpu() -> Any:
    """A CPU device beside those that compute.

    Raises:
      ValueError: if JAX was started without.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as e:
        first = jax.devices()[0].platform
        raise ValueError(f"plan.offload=parameters begins on a CPU: set JAX_PLATFORMS={first},cpu") from e


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _space(x: jax.Array) -> Any:
    return jax.typeof(x).memory_space


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` computed on the host, its results there."""
    there = jax.memory.Space.Host
    return _computed(function, compute_type="device_host", out_memory_spaces=there)(*_move(args, there))


def global_norm(grads: Any) -> jax.Array:
    """Of all gradients together; squares of those that lie on the host are summed there."""
    squares: Callable[[list[Any]], list[Any]] = lambda leaves: [jnp.sum(weights.wide(x) ** 2) for x in leaves]
    leaves = jax.tree.leaves(grads)
    lie = [_space(x) == jax.memory.Space.Host for x in leaves]
    here = iter(squares([x for x, below in zip(leaves, lie, strict=True) if not below]))
    if not any(lie):
        return jnp.sqrt(sum(here))
    # in one call: a TPU's compiler (libtpu 0.0.42.1) fails at a call for each
    there = on_host(squares, [x for x, below in zip(leaves, lie, strict=True) if below])
    up = iter(_move(there, jax.memory.Space.Device))
    return jnp.sqrt(sum(next(up if below else here) for below in lie))


def runner(execution: Execution) -> Callable[[Call], tuple[Any, Any]]:
    """A stack runner whose layers lie on the host: each comes up when it runs, in the backward pass again.

    Args:
      execution: how layers run; its `remat` keeps no parameters.
    """

    def run(call: Call) -> tuple[Any, Any]:
        if len(set(call.group_of)) != len(call.group_of):
            raise ValueError("plan.offload=parameters has no place for layers that share parameters: take update alone")

        def layer(p: Any, index: Any, carry: Any, inputs: Any) -> tuple[Any, Any, Any]:
            return call.layer(_move(p, jax.memory.Space.Device), index, carry, inputs, call.context)

        carry, outputs, sown = scanned(layer, call.params, None, call.group_of, call.carry, call.per_layer, execution)
        if sown:
            raise ValueError("plan.offload=parameters shows no intermediates: take update alone")
        return carry, outputs

    return run


@dataclasses.dataclass(frozen=True)
class HostUpdate:
    """Runs an update whose state lies on the host.

    Attributes:
      computes: on the host (`update`), or on the device (`optimizer`).
      divide: pins gradients and parameters to the shardings of the optimizer's state, so that the host moves nothing
        between devices.
    """

    computes: bool
    divide: Callable[[Any], Any]

    def __call__(self, update: Update, kept: Any, grads: Any, signals: Any) -> Any:
        """`update(kept, grads, signals)`, its results where `kept` was.

        Args:
          update: a pure function; returns a tree like `kept`, and the moved parameters.
          kept: (optimizer state, what learns, average), on host or device.
          grads: on the device.
          signals: see `Signals`.
        """
        spaces, of_params = jax.tree.map(_space, kept), jax.tree.map(_space, grads)
        if not self.computes:
            kept, grads = jax.lax.optimization_barrier((kept, grads))  # state comes up when the layers are done
            new, moved = update(_move(kept, jax.memory.Space.Device), grads, signals)
        else:
            opt_state, learn, average = kept
            new, moved = on_host(update, (opt_state, self.divide(learn), average), self.divide(grads), signals)
            moved = None if moved is None else jax.tree.map(jax.device_put, moved, of_params)
        return jax.tree.map(jax.device_put, new, spaces), moved
