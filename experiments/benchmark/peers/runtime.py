"""What measurements of torch share: the device, its precision, the clock, the optimizer."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmark.sizes import CPU, GPU, Sizes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes() -> Sizes:
    """The sizes of this platform."""
    return GPU if CUDA else CPU


def half(spec: dict[str, Any]) -> bool:
    """Whether products run in bfloat16."""
    return (spec["precision"] or ("bf16" if CUDA else "fp32")) == "bf16"


def autocast(spec: dict[str, Any]) -> Any:
    """Bfloat16 products with float32 parameters."""
    return torch.autocast(DEVICE, torch.bfloat16) if half(spec) else contextlib.nullcontext()


def wait() -> None:
    """Waits for the device."""
    if CUDA:
        torch.cuda.synchronize()


def median_seconds(
    run: Callable[[], Any], count: int, warm: int = 2, pick: Callable[..., float] = statistics.median
) -> float:
    """Median (`pick=min`: the fastest) over `count` runs, after some to warm up."""
    times = []
    for i in range(warm + count):
        began = time.perf_counter()
        run()
        wait()
        if i >= warm:
            times.append(time.perf_counter() - began)
    return pick(times)


def adamw(model: Any, rate: float = 3e-4, b2: float = 0.95) -> torch.optim.AdamW:
    """AdamW that decays matrices only, fused where torch has it."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, b2), fused=True)
