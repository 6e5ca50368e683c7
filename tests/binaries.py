"""Runs binaries of `experiments` inside the test's process, or several of them in one process of their own.

As a program it runs a list of commands, each as `python -m experiments.NAME` would, and prints how each ended.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import pathlib
import runpy
import subprocess
import sys
from typing import NamedTuple

import grain.python  # noqa: F401  declares flags, as `app` does, which must outlive a binary's
from absl import app, flags  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def new_flags():
    """Flags that are declared inside are taken away again, because two binaries share names."""
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)


@contextlib.contextmanager
def binary(name, *arguments):
    """A binary's module with its flags parsed."""
    from experiments import cli

    sys_argv = sys.argv
    sys.argv = [name, *map(str, arguments)]  # ml_collections looks for overrides there
    try:
        with new_flags():
            module = importlib.import_module(f"experiments.{name}")
            cli._parse(sys.argv)
            yield module
    finally:
        sys.argv = sys_argv
        sys.modules.pop(f"experiments.{name}", None)


def call(name, *arguments):
    with binary(name, *arguments) as module:
        module.main(*(a for a in map(str, arguments) if a in getattr(module, "COMMANDS", ())))


def in_a_process(commands, timeout=600):
    """Each command's end; `[name, *arguments]` each. The last one's exit code is the process's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    program = [sys.executable, __file__, json.dumps([list(map(str, c)) for c in commands])]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    try:
        ended = [Ended(*row) for row in json.loads(done.stdout.splitlines()[-1])]
    except (ValueError, IndexError):
        raise AssertionError(done.stderr) from None
    assert len(ended) == len(commands) and done.returncode == ended[-1].code
    return ended


def _run(name, arguments):
    importlib.import_module("experiments.cli")  # its flags stay
    sys.argv, out, err, code = [name, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), new_flags():
        try:
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code or 0
    for logger in ("llm_jax", "experiments"):  # their handlers write to this command's stderr
        logging.getLogger(logger).handlers.clear()
    return Ended(code, out.getvalue(), err.getvalue())


if __name__ == "__main__":
    results = [_run(name, arguments) for name, *arguments in json.loads(sys.argv[1])]
    print(json.dumps(results))
    sys.exit(results[-1].code)
