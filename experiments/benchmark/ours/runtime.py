"""What measurements of ours share: the device, its precision and memory, fresh parameters, the clock."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.sizes import CPU, GPU, Sizes
from llm_jax.nn import weights
from llm_jax.nn.protocols import Model, Params
from llm_jax.training.precision import Precision


def on_cpu() -> bool:
    """Whether the first device is a CPU."""
    return jax.devices()[0].platform == "cpu"


def sizes() -> Sizes:
    """The sizes of this platform."""
    return CPU if on_cpu() else GPU


def precision_of(spec: dict[str, Any]) -> Precision:
    """Float32 on a CPU, bfloat16 with float32 parameters elsewhere, or as asked."""
    return Precision(spec["precision"] or ("fp32" if on_cpu() else "bf16"))


def fresh(model: Model) -> Params:
    """Initialised parameters."""
    init = jax.jit(lambda key: weights.split_axes(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])[0])
    return init(jax.random.key(0))


def peak_bytes() -> int:
    """Peak memory: of the process on a CPU, of the device elsewhere."""
    if on_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


def median_seconds(run: Callable[[], Any], count: int, pick: Callable[..., float] = statistics.median) -> float:
    """Median (`pick=min`: the fastest) over `count` runs, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(count):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return pick(times)
