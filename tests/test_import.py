"""Importing any module of the library touches no device, and needs no framework but its own."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if name == "llm_jax":
        assert "jax" not in sys.modules, "import llm_jax alone imports jax"
from jax._src import xla_bridge
assert not xla_bridge._backends, f"touched {list(xla_bridge._backends)}"
for name in ("torch", "transformers", "peft", "tensorflow", "experiments", "ml_collections"):
    assert name not in sys.modules, name
print(len(sys.argv) - 1)
"""


def test_importing_everything_touches_no_device():
    files = sorted((ROOT / "llm_jax").rglob("*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    assert names[0] == "llm_jax" and len(names) > 40
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names)
