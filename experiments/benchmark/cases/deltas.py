"""Deltas on SmolLM2-135M: what a training step costs beside the whole model's and beside peft, and decoding.

    make bench CASES=deltas

Wanted on 2 CPU cores: LoRA's step at most 0.75 of our whole step and at most 1 / 1.5 of peft's, DoRA's at most 1.15 of
LoRA's; with a bank of 8 adapters at least 1 / 1.15 of the tokens a second that one LoRA gives.

On two cores of a Xeon (jax 0.10.2, medians) the whole step takes 2.3 to 2.7 s, LoRA's 1.75 to 1.8 (0.67 to 0.78 of it),
DoRA's 2.1 (1.18 of LoRA's), and a bank of 8 gives 1 / 1.14 of one LoRA's tokens a second. The LoRA of peft in eager
torch takes 1.62 s, less than ours and not 1.5 times as much (its DoRA 2.29): of our 1.75 s, products with the base are
1.05, at 285 GFLOP/s, so that 1.08 s in all is out of reach.

As traced, LoRA's step has 0.69 of the whole step's FLOPs (300 of 434 G), and DoRA's 1.01 of LoRA's. FLOPs of the table
are those of the compiled program beside our count (`training.flops`), which leaves out norms, activations and the
optimizer.
"""

from experiments.benchmark.bench import Bench, Contestant, Row, row, value_of

METHODS = ("whole", "LoRA", "DoRA", "forward")
SHAPE = [4, 128]
BATCH = {"batch": 8, "prompt": 32, "new": 64}
ADAPTERS = {"no adapter": 0, "one LoRA": 1, "a bank of 8": 8}


def _steps(bench: Bench) -> list[Row]:
    ours: dict[str, Contestant] = {m: ("ours.deltas:step", {"method": m, "shape": SHAPE}) for m in METHODS}
    peers: dict[str, Contestant] = {
        f"peft eager, {m}": ("peers.peft:step", {"method": m, "shape": SHAPE}) for m in ("LoRA", "DoRA")
    }
    results = bench.turns({**ours, **peers})
    seconds = lambda name: results[name]["value"]
    rows = [
        row(f"a step, {name}", seconds(name), f"our {other}", seconds(other), "s")
        for name, other in (("LoRA", "whole"), ("DoRA", "LoRA"), ("forward", "whole"))
    ]
    for name in ("LoRA", "DoRA"):
        peer = f"peft eager, {name}"
        rows.append(row(f"a step, {name}", seconds(name), peer, value_of(results, peer), "s"))
    peak = {name: results[name]["peak_bytes"] for name in METHODS}
    rows += [row(f"peak memory, {name}", peak[name], "our whole", peak["whole"], "bytes") for name in METHODS]
    return rows


def _counts(bench: Bench) -> list[Row]:
    found = {m: bench.ours("ours.deltas:count", method=m, shape=SHAPE) for m in METHODS}
    rows, whole = [], found["whole"]
    for name, counts in found.items():
        rows.append(row(f"FLOPs of a step, {name}", counts["value"], "our whole", whole["value"], "FLOPs"))
        rows.append(row(f"FLOPs of a step, {name}", counts["value"], "our count", counts["counted"], "FLOPs"))
        rows.append(row(f"bytes of a step, {name}", counts["bytes"], "our whole", whole["bytes"], "bytes"))
    return rows


def _decoding(bench: Bench) -> list[Row]:
    results = bench.turns(
        {name: ("ours.deltas:decode", {**BATCH, "adapters": count}) for name, count in ADAPTERS.items()}
    )
    rows = []
    for name, other in (("one LoRA", "no adapter"), ("a bank of 8", "one LoRA")):
        ours, theirs = results[name], results[other]["value"]
        limit = BATCH["batch"] * bench.bandwidth / ours["bytes_per_step"]
        rows.append(row(f"decode with {name}, batch 8", ours["value"], f"our {other}", theirs, "tokens/s", limit))
    return rows


def all_of(bench: Bench) -> list[Row]:
    """Seconds, FLOPs, bytes and memory of steps; tokens a second of decoding."""
    return _steps(bench) + _counts(bench) + _decoding(bench)
