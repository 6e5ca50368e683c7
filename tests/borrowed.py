"""Tests of one folder that another runs too, on other devices or on more rows."""

import importlib.util
import pathlib


def module(path):
    """A file below `tests`, as a module of its own."""
    file = pathlib.Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
