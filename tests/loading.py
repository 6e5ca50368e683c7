"""Peak memory of loading a model, measured in a process of its own."""

import os
import subprocess
import sys

import pytest


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes; getrusage's peak would be the parent's where that is larger."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def _in_process(*arguments: str) -> list[int]:
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc, which is Linux's")
    command = [sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [int(x) for x in done.stdout.split()[-2:]]


def peak_of_streaming(path: object) -> tuple[int, int]:
    """(bytes of the layers, bytes that the process grew by at most while it ran the model with them streamed)."""
    layers, peak = _in_process("stream", str(path))
    return layers, peak


def peak_of_loading(path: object, small: object, dtype: str | None = None) -> tuple[int, int]:
    """(bytes of the parameters, bytes that the process grew by at most while it loaded them).

    A `small` model is loaded before, so that imports and traces are not counted.
    """
    size, peak = _in_process("load", str(path), str(small), dtype or "")
    return size, peak


def _load(path: str, small: str, dtype: str) -> tuple[int, int]:
    import jax

    from llm_jax import interop
    from llm_jax.nn import weights

    interop.load(small, dtype=dtype or None)
    before = _memory("VmRSS")
    loaded = interop.load(path, dtype=dtype or None)
    jax.block_until_ready(loaded.params)
    return weights.bytes_of(loaded.params), _memory("VmHWM") - before


def _stream(path: str) -> tuple[int, int]:
    import jax
    import numpy as np

    from llm_jax import interop
    from llm_jax.nn import weights

    ids = np.ones((1, 4), np.int32)
    before = _memory("VmRSS")
    loaded = interop.load(path, stream=True)
    jax.block_until_ready(jax.jit(lambda p: loaded.model.apply({"params": p}, ids).logits)(loaded.params))
    peak = _memory("VmHWM") - before  # what XLA takes to compile is in it
    whole = interop.load(path).params
    return weights.bytes_of(whole["decoder"]["layers"]), peak


if __name__ == "__main__":
    print(*{"load": _load, "stream": _stream}[sys.argv[1]](*sys.argv[2:]))
