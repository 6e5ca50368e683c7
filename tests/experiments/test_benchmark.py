"""The benchmark's cases name programs that exist, and their turns become rows; no program runs."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmark.bench import Bench, Row
from experiments.benchmark.cases import CASES

FIELDS = ("flops_per_token", "peak_bytes", "loss", "hashed", "counted", "bytes")  # of one program or another
FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "benchmark"


class Pretended(Bench):
    """Answers for every program, whose names it keeps; peers are not installed, or twice as slow."""

    def __init__(self, peers: bool, shakespeare: str) -> None:
        super().__init__(rounds=1, tiny=True, shakespeare=shakespeare)
        self.peers, self.started = peers, []

    def _start(self, program, spec, environment):
        self.started.append(program)
        json.dumps(spec)
        if program.startswith("peers.") and not self.peers:
            return None
        value = 1.0 if program.startswith("peers.") else 2.0
        fields = {"encode": ("flops",), "decode": ("bytes_per_step", "flops_per_step")}.get(
            program.partition(":")[2], ()
        )
        return {"value": value, "platform": "cpu", **dict.fromkeys((*FIELDS, *fields), value)}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_with_its_peers_and_without(name):
    for peers in (True, False):
        bench = Pretended(peers, str(FOLDER / "__main__.py"))
        rows = CASES[name](bench)
        assert rows and all(isinstance(row, Row) and row.ours == 2 for row in rows)
        alone = ("-", "nanoGPT README", "4 layers", "our ")  # no peers of another library
        beside = [row.theirs for row in rows if not row.peer.startswith(alone)]
        assert all(value == (1 if peers else None) for value in beside)
        assert all(row.ratio == (row.theirs and row.ours / row.theirs) for row in rows)
        for program in bench.started:
            module, _, function = program.partition(":")
            tree = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())
            assert function in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}, program


def test_an_unknown_case_is_one_line():
    command = [sys.executable, "-m", "experiments.benchmark", "--cases=train,walk"]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: unknown cases walk; there are train, memory")
