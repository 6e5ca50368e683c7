"""The accelerators that plans are made for, and descriptions of pods that are not there."""

import dataclasses
import os
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker's data sheet says of one chip.

    Attributes:
      kind: its name in jax, at least the beginning.
      flops: dense bfloat16 operations a second.
      hbm: bytes of memory; 0 where it is sold in several sizes.
      hbm_bandwidth: bytes a second.
      links: bytes a second that it sends to its neighbours over all of its links; 0 where there is no torus.
      clock: cycles a second, in which a TPU's compiler estimates.
    """

    kind: str
    flops: float
    hbm: float = 0.0
    hbm_bandwidth: float = 0.0
    links: float = 0.0
    clock: float = 0.0


# https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e: the clock is the peak over 2 x 128 x 128 operations
# (v6e: 256 x 256) of each of 8, 4, 8 and 4 matrix units; links count one of the two directions of the data sheet
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1640e9, 400e9, 1.75e9),
    "a100": Chip("NVIDIA A100", 312e12),
    "h100": Chip("NVIDIA H100", 989e12, 80 * 2**30, 3350e9),
    "h200": Chip("NVIDIA H200", 989e12, 141 * 10**9, 4800e9),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
# what libtpu reads before it is loaded: there is no TPU, and nobody is asked where it is
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class TopologyError(ValueError):
    """A topology that cannot be described here; one line that says why."""


def chip_of(kind: str) -> Chip | None:
    """The chip that jax calls `kind`, None for others; the longest name that fits."""
    found = [c for c in CHIPS.values() if kind.startswith(c.kind)]
    return max(found, key=lambda c: len(c.kind), default=None)


def split(topology: str) -> tuple[str, tuple[int, ...]]:
    """Splits a topology's name: `v5e:16x16` is (`v5e`, (16, 16)).

    Raises:
      TopologyError: if the name has another form.
    """
    name, _, shape = topology.partition(":")
    sizes = shape.split("x")
    dims = 2 if name in ("v5e", "v6e") else 3
    if name not in TPUS or not all(s.isdigit() and int(s) for s in sizes) or len(sizes) != dims:
        raise TopologyError(
            f"topology={topology!r} is none that is known: v5e:XxY and v6e:XxY (up to 16x16), v4:XxYxZ and v5p:XxYxZ, "
            "counted in chips, for example v5e:16x16 or v5p:8x8x8"
        )
    return name, tuple(int(s) for s in sizes)


def describe(topology: str) -> Any:
    """The devices of a pod for the compiler, without the pod.

    `ENVIRONMENT` must have been set before jax was imported. Cloud names of v4 and v5p count cores, this counts chips.

    Args:
      topology: as `v5e:16x16`.

    Raises:
      TopologyError: if it is unknown, or libtpu is missing or does not fit.
    """
    name, shape = split(topology)
    missing = {key for key, value in ENVIRONMENT.items() if os.environ.get(key) != value}
    if missing:
        raise TopologyError(f"set {', '.join(sorted(missing))} before jax is imported (chips.ENVIRONMENT)")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if name in ("v4", "v5p"):  # three dimensions, whole torus rings from cubes of 4 on, one device a chip
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
        options |= {"wrap": tuple(s % 4 == 0 for s in shape)}
    family = {"v5p": "v5"}.get(name, name)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{family}:{'x'.join(map(str, shape))}", **options
        )
    except Exception as e:
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        hint = "pip install libtpu (the version that this jax names: pip install 'jax[tpu]')"
        raise TopologyError(f"topology {topology} cannot be described: {text}; {hint}") from e
    if len(found.devices) != np.prod(shape):
        raise TopologyError(f"topology {topology} has {len(found.devices)} devices, not one a chip")
    return found
