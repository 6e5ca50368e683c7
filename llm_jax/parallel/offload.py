"""Host memory as the second floor of a device's: what lies there between steps, and where the update runs.

The optimizer's state (with the float32 master copy and the average) is read and written once a step, so it may lie in
pinned host memory. Either it is streamed through the device for the update (`optimizer`), or gradients go down, the
update is computed on the host, and new parameters come up (`update`): 4 bytes a parameter over the bus in half
precision, where streaming moves 24.

Sources: Ren et al. 2021 (ZeRO-Offload), https://arxiv.org/abs/2101.06840.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compute_on import compute_on
from jax.sharding import NamedSharding

KINDS = ("optimizer", "update", "disk")
ELEMENTWISE = ("sgd", "adam", "adamw", "lion")  # optimizers whose update a host can compute, or pieces can take
HOST = "pinned_host"
Update = Callable[[Any, Any, Any], Any]  # (kept, gradients, signals) -> (new, moved)


def lies_on_host(x: Any) -> bool:
    """Whether an array of offloaded state goes to the host: counters stay."""
    return x.ndim > 0


def to_host(shardings: Any, shapes: Any) -> Any:
    """The same shardings in host memory, but for scalars."""
    put = lambda s, x: s.with_memory_kind(HOST) if lies_on_host(x) else s
    return jax.tree.map(put, shardings, shapes, is_leaf=lambda s: isinstance(s, NamedSharding))


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


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


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
          signals: whether the gradient is finite, and a key.
        """
        spaces = jax.tree.map(lambda x: jax.typeof(x).memory_space, kept)
        if not self.computes:
            new, moved = update(_move(kept, jax.memory.Space.Device), grads, signals)
        else:
            opt_state, learn, average = kept
            down = (opt_state, self.divide(learn), average), self.divide(grads), signals
            new, moved = compute_on("device_host")(jax.jit(update))(*_move(down, jax.memory.Space.Host))
            moved = _move(moved, jax.memory.Space.Device)
        return jax.tree.map(jax.device_put, new, spaces), moved
