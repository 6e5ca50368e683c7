"""nanoGPT's published CPU setting; its README gives a loss of 1.88 after about three minutes."""

import os
import sys

from experiments.benchmark.bench import Bench, Row, row

PEER = "transformers GPT-2, torch.compile"
PUBLISHED = 1e-3
RATES = (("adamw", PUBLISHED), ("adamw", 4e-3), ("muon", 2e-2))  # the others change the optimizer and nothing else


def train(bench: Bench) -> list[Row]:
    """Seconds of 2,000 steps and the loss on the validation part."""
    if not os.path.exists(bench.shakespeare):
        print(f"shakespeare: left out, there is no {bench.shakespeare}", file=sys.stderr)
        return []
    theirs = bench.measure("peers.shakespeare:train", path=bench.shakespeare)
    seconds, loss = (theirs["value"], theirs["loss"]) if theirs else (None, None)
    rows = []
    for optimizer, rate in RATES:
        ours = bench.ours("ours.shakespeare:train", path=bench.shakespeare, optimizer=optimizer, learning_rate=rate)
        case, unit = f"nanoGPT's Shakespeare, {optimizer} {rate:g}", "nats/character"
        rows.append(row(f"{case}, validation loss", ours["loss"], "nanoGPT README", 1.88, unit))
        rows.append(row(f"{case}, 2,000 steps", ours["value"], PEER, seconds, "s"))
        if rate == PUBLISHED:  # the peer's
            rows.append(row(f"{case}, validation loss", ours["loss"], PEER, loss, unit))
    return rows
