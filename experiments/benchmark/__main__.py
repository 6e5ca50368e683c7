"""Speed and memory beside other libraries in the same run.

    python -m experiments.benchmark --json=bench.json
    python -m experiments.benchmark --cases=train,decode --rounds=3
    python -m experiments.benchmark --cases=shakespeare --shakespeare=FILE

Every measurement is a process of its own (`program`); ours and the peer's take turns, `--rounds` times, and medians are
compared (`bench`). A case of `cases` names the programs that measure it: those of `ours`, and of `peers`, whose columns
stay empty where a package is not installed.

Rows are `case, ours, peer, theirs, ratio, limit, limit_share, unit`. The limit of training is the fastest large
matrix product seen in the same run over the model FLOPs of a token (`training.flops`), that of decoding the fastest
read of memory over the bytes of parameters and cache that a token needs, or its products' at that rate where they take
longer (beams).
"""

import json
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.benchmark.bench import Bench, Row
from experiments.benchmark.cases import CASES

CASE = flags.DEFINE_list("cases", ",".join(CASES), f"What to measure: {', '.join(CASES)}.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns that every contestant takes.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "Write the rows to this file.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes: shows that everything runs; the figures mean nothing.")
SHAKESPEARE = flags.DEFINE_string(
    "shakespeare",
    "../shared/data/tinyshakespeare/input.txt",
    "nanoGPT's character corpus; its case is left out without.",
)
TEXT = flags.DEFINE_string(
    "text",
    None,
    "For ngrams and word2vec: a sentence a line, words between blanks; by default the standard library's sources.",
)
PRECISION = flags.DEFINE_enum("precision", None, ["fp32", "bf16"], "fp32 on a CPU, bf16 on a GPU by default.")


def _show(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def in_columns(rows: Sequence[Row]) -> str:
    """The rows in columns, under their names."""
    lines = [Row._fields, *(tuple(map(_show, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the rows."""
    del argv
    unknown = set(CASE.value) - set(CASES)
    if unknown:
        sys.exit(f"error: unknown cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    bench = Bench(ROUNDS.value, TINY.value, PRECISION.value, TEXT.value, SHAKESPEARE.value)
    rows: list[Row] = []
    for name in CASE.value:
        print(name, file=sys.stderr, flush=True)
        rows += CASES[name](bench)
        if JSON.value:  # after every case, so that an interruption loses nothing
            with open(JSON.value, "w") as f:
                json.dump([row._asdict() for row in rows], f, indent=2)
    print(f"device: {bench.device['value']}")
    print(in_columns(rows))


if __name__ == "__main__":
    app.run(main)
