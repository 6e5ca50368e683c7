"""What a plan costs on one device: whole training steps of Llama 3.2 1B, or of a toy.

Measured are tokens a second, peak memory of the device, bytes of state by where they lie, and the losses of all steps,
which plans share but for rounding.

On an NVIDIA H100 (80 GB; bfloat16 over float32 weights, 8 rows of 2,048 tokens, 4 chunks of the loss; jax 0.11.2; a
large product reaches 718 TFLOP/s, the data sheet says 989):
    plan                    tokens/s   MFU    peak GB   state on device and host, GB
    unrolled                  65,982   0.548     37.4   14.8
    scanned                   59,778   0.497     39.7   14.8
    remat=full                55,913   0.465     24.1   14.8
    remat=names:attention,mlp 55,879   0.464     25.0   14.8
    offload=optimizer         26,167   0.217     29.8    4.9 + 9.9
    offload=update             6,281   0.052     24.6    2.5 + 14.8 (Adam on 16 cores of the host; master=in_optimizer)
A later commit, on another H100 of the kind (scanned 58,938, 39.7 GB):
    remat=dots                57,812   0.481     35.0   14.8 (keeps what attention's kernel returns)
    offload=update,parameters  3,975   0.033      6.0    0.5 + 16.8 (remat=full; parameters travel layer by layer)
32 rows, 16 chunks:
    remat=full                58,871   0.489     33.7   14.8
    remat=offload:block       53,447   0.444     29.4   14.8
Before the state waited for the layers, offload=optimizer held as much as none (39.7 GB).
"""

import sys
from typing import Any

from experiments.benchmark.bench import Bench, Row, row

LARGE = {"rows": 32, "length": 2048, "chunks": 16}
VARIANTS: dict[str, dict[str, Any]] = {  # fields of PlanConfig, and another shape
    "unrolled": {"plan": {"unroll": True}},
    "scanned": {},
    **{f"remat={kind}": {"plan": {"remat": kind}} for kind in ("dots", "full", "names:attention,mlp")},
    "offload=optimizer": {"plan": {"offload": ["optimizer"]}},
    "offload=update": {"plan": {"offload": ["update"], "master": "in_optimizer"}},
    "offload=update,parameters": {
        "plan": {"offload": ["update", "parameters"], "master": "in_optimizer", "remat": "full"}
    },
    **{f"remat={kind}, 32 rows": {"plan": {"remat": kind}, **LARGE} for kind in ("full", "offload:block")},
}


def train(bench: Bench) -> list[Row]:
    """Speed and memory of a model of 1.2 billion parameters under plans for one accelerator."""
    if bench.device["platform"] == "cpu" and not bench.given["tiny"]:
        print("plans: left out, they are of an accelerator", file=sys.stderr)
        return []
    rows = []
    for name, variant in VARIANTS.items():
        ours = bench.turns({name: ("ours.plans:train", variant)})[name]
        limit = bench.product / ours["flops_per_token"]
        rows.append(row(f"train Llama 1B, {name}", ours["value"], "-", None, "tokens/s", limit))
        rows.append(row(f"peak memory, {name}", ours["peak_bytes"], "-", None, "bytes"))
    return rows
