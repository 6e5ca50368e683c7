"""What the machine allows: its fastest product and read of memory; and what it is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.ours.runtime import median_seconds, on_cpu, precision_of, sizes


def matmul(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a large product at its fastest: a limit."""
    n = 256 if spec["tiny"] else sizes().side
    dtype = precision_of(spec).dtype
    x, w = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    return {"value": 2 * n**3 / median_seconds(functools.partial(jax.jit(jnp.dot), x, w), 10, min)}


def bandwidth(spec: dict[str, Any]) -> dict[str, Any]:
    """Bytes per second of a matrix-vector product too large for any cache, the access pattern of decoding."""
    n = 256 if spec["tiny"] else 16384
    w, x = jnp.ones((n, n), jnp.float32), jnp.ones((n,), jnp.float32)
    return {"value": 4 * n * n / median_seconds(functools.partial(jax.jit(lambda w, x: w @ x), w, x), 10, min)}


def device(spec: dict[str, Any]) -> dict[str, Any]:
    """Name of the hardware, and its platform."""
    del spec
    name = jax.devices()[0].device_kind
    if on_cpu():
        with open("/proc/cpuinfo") as f:
            models = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = f"{len(models)} cores of {models[0] if models else 'an unnamed CPU'}"
    return {"value": f"{name}, jax {jax.__version__}", "platform": jax.devices()[0].platform}
