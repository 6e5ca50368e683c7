"""One measurement in a process of its own, so that peak memory is its own and torch stays out of ours.

    python -m experiments.benchmark.program ours.gpt2:train '{"unroll": true, "tiny": true}'

PROGRAM is a function of a module below `experiments.benchmark`; it takes the JSON object and returns one with `value`,
which is printed. The exit code is 42 where a peer's package is not installed.
"""

import importlib
import json
import sys

MISSING = 42
PEERS = (
    "torch",
    "transformers",
    "ctranslate2",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "kenlm",
    "gensim",
    "sklearn",
    "peft",
)


def main(program: str, spec: str) -> None:
    """Runs `program` and prints what it returns."""
    module, _, function = program.partition(":")
    try:
        measure = getattr(importlib.import_module(f"experiments.benchmark.{module}"), function)
        print(json.dumps(measure({"tiny": False, "precision": None, **json.loads(spec)})))
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in PEERS:
            raise
        sys.exit(MISSING)


if __name__ == "__main__":
    main(*sys.argv[1:])
