"""GPT-2 small beside torch and transformers: training, its memory, decoding, compiling."""

import functools

from experiments.benchmark.bench import Bench, Contestant, Result, Row, row, value_of

PEERS = ("torch.compile", "torch eager")
FORMS = ("unrolled", "scanned")


@functools.cache
def _training(bench: Bench) -> dict[str, Result]:
    """Speed and peak memory of training, shared by two cases."""
    return bench.turns(
        {
            "unrolled": ("ours.gpt2:train", {"unroll": True}),
            "torch.compile": ("peers.gpt2:train", {"compile": True}),
            "scanned": ("ours.gpt2:train", {"unroll": False}),
            "torch eager": ("peers.gpt2:train", {"compile": False}),
        }
    )


def train(bench: Bench) -> list[Row]:
    """Tokens a second of whole steps."""
    results, rows = _training(bench), []
    for form in FORMS:
        limit = bench.product / results[form]["flops_per_token"]
        for peer in PEERS:
            theirs = value_of(results, peer)
            rows.append(row(f"train GPT-2 small, {form}", results[form]["value"], peer, theirs, "tokens/s", limit))
    return rows


def memory(bench: Bench) -> list[Row]:
    """Peak memory of the same steps."""
    results, peer = _training(bench), "torch.compile"
    theirs = results[peer]["peak_bytes"] if peer in results else None
    return [row(f"peak memory of training, {f}", results[f]["peak_bytes"], peer, theirs, "bytes") for f in FORMS]


def decode(bench: Bench) -> list[Row]:
    """New tokens a second of greedy decoding, the prompt's reading included."""
    rows, peer = [], "transformers generate"
    for batch in (1, 8):
        spec = {"batch": batch, "prompt": 32, "new": 64}
        contestants: dict[str, Contestant] = {"ours": ("ours.gpt2:decode", spec), peer: ("peers.gpt2:decode", spec)}
        results = bench.turns(contestants)
        ours, theirs = results["ours"], value_of(results, peer)
        limit = batch * bench.bandwidth / ours["bytes_per_step"]
        rows.append(row(f"decode GPT-2 small, batch {batch}", ours["value"], peer, theirs, "tokens/s", limit))
    return rows


def compile_time(bench: Bench) -> list[Row]:
    """Seconds to compile the training step; the peer is our own step at 4 layers."""
    rows = []
    for form in ("scanned", "unrolled"):
        few, many = (
            bench.ours("ours.gpt2:compile_time", unroll=form == "unrolled", layers=layers)["value"]
            for layers in (4, 24)
        )
        rows.append(row(f"compile 24 layers, {form}", many, f"4 layers, {form}", few, "s"))
    return rows
