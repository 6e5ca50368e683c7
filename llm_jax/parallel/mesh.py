"""Builds meshes, for the whole library."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("replica", "data", "pipe", "seq", "model")


def _position(d: Any) -> tuple[int, ...]:
    """Position of a TPU's device: its slice, its coordinates from the slowest on, its core."""
    return (getattr(d, "slice_index", None) or 0, *reversed(d.coords), d.core_on_chip)


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all axes, in the order of `AXES`; missing ones have size 1.

    All axes are Auto: `jax.make_mesh` would make them Explicit, where Linen modules fail.

    Args:
      sizes: axis sizes; `data=-1` takes the devices that are left.
      devices: all devices by default; there must be as many as the mesh needs.

    Raises:
      ValueError: on an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; there are {', '.join(AXES)}")
    shape = {a: sizes.get(a, 1) for a in AXES}
    if shape["data"] == -1:
        shape["data"] = 1
        rest, over = divmod(len(devices), math.prod(shape.values()))
        if over or not rest:
            raise ValueError(f"{len(devices)} devices do not divide by the other axes {shape}")
        shape["data"] = rest
    need = math.prod(shape.values())
    if need != len(devices):
        raise ValueError(
            f"the plan's axes {shape} need {need} devices, there are {len(devices)}: change plan.data, plan.pipe, "
            "plan.seq or plan.model, or pass --simulate_devices on a CPU"
        )
    if devices[0].platform == "tpu":  # slice by slice along the torus, not host by host
        devices = sorted(devices, key=_position)
    return Mesh(np.asarray(devices).reshape(tuple(shape.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
