"""Runs a binary of `experiments` inside the test's process."""

import contextlib
import importlib
import sys

from absl import flags

from experiments import cli


@contextlib.contextmanager
def binary(name, *arguments):
    """A binary's module with its flags parsed; they are taken away again, because two binaries share names."""
    before, sys_argv = set(flags.FLAGS), sys.argv
    sys.argv = [name, *map(str, arguments)]  # ml_collections looks for overrides there
    try:
        module = importlib.import_module(f"experiments.{name}")
        cli._parse(sys.argv)
        yield module
    finally:
        sys.argv = sys_argv
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        sys.modules.pop(f"experiments.{name}", None)


def call(name, *arguments):
    with binary(name, *arguments) as module:
        module.main(*(a for a in map(str, arguments) if a in getattr(module, "COMMANDS", ())))
