"""Contestants take turns, each turn in a process of its own, and medians are compared, because machines are noisy."""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.benchmark.program import MISSING

Result = dict[str, Any]  # what a program prints: `value`, and what else it measured
Contestant = tuple[str, dict[str, Any]]  # the program (see `program`) and what it is given

XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_cpu_copy_insertion_use_region_analysis=true"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      case: what was measured.
      ours: our value.
      peer: whom it is compared with.
      theirs: the peer's value, None where there is none.
      ratio: ours over theirs.
      limit: what the machine allows.
      limit_share: ours over the limit.
      unit: of the values.
    """

    case: str
    ours: float
    peer: str
    theirs: float | None
    ratio: float | None
    limit: float | None
    limit_share: float | None
    unit: str


def row(case: str, ours: float, peer: str, theirs: float | None, unit: str, limit: float | None = None) -> Row:
    """A row with its ratios."""
    ratio = ours / theirs if theirs is not None and theirs > 0 else None
    return Row(case, ours, peer, theirs, ratio, limit, None if limit is None else ours / limit, unit)


def value_of(results: Mapping[str, Result], name: str) -> float | None:
    """A contestant's median, None where it could not run."""
    return results[name]["value"] if name in results else None


class Bench:
    """Runs programs.

    Attributes:
      rounds: turns that every contestant takes.
      text: file of sentences for n-grams and word vectors, None for the standard library's sources.
      shakespeare: nanoGPT's corpus.
      given: `tiny` and `precision`, for every program.
    """

    def __init__(
        self, rounds: int, tiny: bool, precision: str | None = None, text: str | None = None, shakespeare: str = ""
    ) -> None:
        """See the attributes; `tiny` takes toy sizes, `precision` is fp32 or bf16, None for the platform's."""
        self.rounds, self.text, self.shakespeare = rounds, text, shakespeare
        self.given = {"tiny": tiny, "precision": precision}

    @functools.cached_property
    def device(self) -> Result:
        """`platform` and `value`, a name; read in another process, since this one must not hold the accelerator."""
        return self._start("ours.limits:device", {}, dict(os.environ))

    @functools.cached_property
    def product(self) -> float:
        """FLOP/s of the fastest large matrix product that either side has shown."""
        results = [self.measure("ours.limits:matmul"), self.measure("peers.gpt2:matmul")]
        return max(r["value"] for r in results if r is not None)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second of our fastest read of memory."""
        return self.ours("ours.limits:bandwidth")["value"]

    @functools.cached_property
    def _environment(self) -> dict[str, str]:
        """On a CPU: large pages for malloc, as the Makefile sets them, and what saves memory in XLA."""
        if self.device["platform"] != "cpu":
            return dict(os.environ)
        return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_FLAGS": XLA_FLAGS, **os.environ}

    def _start(self, program: str, spec: Mapping[str, Any], environment: dict[str, str]) -> Any:
        command = [sys.executable, "-m", "experiments.benchmark.program", program, json.dumps({**self.given, **spec})]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode == MISSING:
            return None
        if done.returncode and program.startswith("peers."):  # torch.compile cannot link in a path with spaces, for one
            print(f"{program} {spec} failed, its column stays empty:\n{done.stderr[-500:]}", file=sys.stderr)
            return None
        if done.returncode:
            raise RuntimeError(f"{program} {spec} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def measure(self, program: str, **spec: Any) -> Result | None:
        """Runs one measurement; None where a peer's package is not installed or its program fails."""
        return self._start(program, spec, self._environment)

    def ours(self, program: str, **spec: Any) -> Result:
        """Runs one measurement of ours, which must succeed."""
        result = self.measure(program, **spec)
        assert result is not None, program
        return result

    def turns(self, contestants: Mapping[str, Contestant]) -> dict[str, Result]:
        """Median of every contestant's `value` over alternating turns, with the last turn's other fields."""
        seen: dict[str, list[Result]] = {name: [] for name in contestants}
        for _ in range(self.rounds):
            for name, (program, spec) in contestants.items():
                result = self.measure(program, **spec)
                if result is not None:
                    seen[name].append(result)
                    print(f"  {name}: {result['value']:.4g}", file=sys.stderr, flush=True)
        return {n: {**r[-1], "value": statistics.median(x["value"] for x in r)} for n, r in seen.items() if r}

    def beside(self, case: str, ours: Contestant, peer: str, theirs: Contestant, unit: str) -> Row:
        """A row of ours and of one peer."""
        results = self.turns({"ours": ours, peer: theirs})
        return row(case, results["ours"]["value"], peer, value_of(results, peer), unit)
