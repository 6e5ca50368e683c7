"""Peak memory of loading a model, measured in a process of its own."""

import os
import subprocess
import sys

import pytest


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes; getrusage's peak would be the parent's where that is larger."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def peak_of_loading(path: object, small: object, dtype: str | None = None) -> tuple[int, int]:
    """(bytes of the parameters, bytes that the process grew by at most while it loaded them).

    A `small` model is loaded before, so that imports and traces are not counted.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("peak memory is read from /proc, which is Linux's")
    command = [sys.executable, __file__, str(path), str(small), dtype or ""]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    size, peak = done.stdout.split()[-2:]
    return int(size), int(peak)


if __name__ == "__main__":
    import jax

    from llm_jax import interop
    from llm_jax.nn import weights

    interop.load(sys.argv[2], dtype=sys.argv[3] or None)
    before = _memory("VmRSS")
    loaded = interop.load(sys.argv[1], dtype=sys.argv[3] or None)
    jax.block_until_ready(loaded.params)
    print(weights.bytes_of(loaded.params), _memory("VmHWM") - before)
