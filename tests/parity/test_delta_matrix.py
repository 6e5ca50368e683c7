"""Every method of delta tuning on every family, over a float and an int8 base; what cannot be is refused with a reason.

`python tests/parity/test_delta_matrix.py` prints the table of WORKSPACE.md, which a test compares.
"""

import pathlib
import sys

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import delta_cells
from delta_cells import BASES, CELLS, CHECKS, DECODERS, FAMILIES, METHODS


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Cells compile as in `make test`."""


@pytest.mark.parametrize("method, model, base", CELLS)  # `model` shares cells out to workers
def test_cells(method, model, base):
    if words := delta_cells.impossible(method, base):
        with pytest.raises(ValueError, match=words):
            delta_cells.attached(method, model, base)
        return
    for name, check in CHECKS.items():
        if name != "merge" or METHODS[method].merges:
            check(method, model, base)
    if model in DECODERS:
        delta_cells.check_decoding(method, model, base)


def mark(method, base):
    """How a cell is shown: what is held to be equal."""
    if delta_cells.impossible(method, base):
        return "refused"
    return "=, merges" if METHODS[method].merges else "="


def table():
    """Markdown: bases across, methods down; every mark stands for all families."""
    lines = [f"| method, on {', '.join(FAMILIES)} | {' | '.join(BASES)} |", f"| --- |{' --- |' * len(BASES)}"]
    return "\n".join([*lines, *(f"| {m} | {' | '.join(mark(m, base) for base in BASES)} |" for m in METHODS)])


def test_workspace_shows_the_table():
    workspace = pathlib.Path(__file__).resolve().parents[2] / "WORKSPACE.md"
    assert table() in workspace.read_text(), "paste what `python tests/parity/test_delta_matrix.py` prints"


if __name__ == "__main__":
    print(table())
