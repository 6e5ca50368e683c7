"""The other families beside torch, transformers and inference engines: encoding, translating, training steps."""

from collections.abc import Mapping
from typing import Any

from experiments.benchmark.bench import Bench, Contestant, Row, row, value_of


def _rows(bench: Bench, case: str, ours: Contestant, peers: Mapping[str, Contestant]) -> list[Row]:
    """A row a peer; the limit is the product's, or that of reading weights and cache where it is slower."""
    results = bench.turns({"ours": ours, **peers})
    found, limit = results["ours"], None
    if "flops" in found:
        limit = bench.product / found["flops"]
    if "bytes_per_step" in found:
        seconds = max(found["bytes_per_step"] / bench.bandwidth, found["flops_per_step"] / bench.product)
        limit = ours[1]["batch"] / seconds
    return [row(case, found["value"], peer, value_of(results, peer), "tokens/s", limit) for peer in peers]


def encode(bench: Bench) -> list[Row]:
    """Tokens a second through BERT base."""
    spec = {"family": "bert", "shape": [8, 128]}
    peers: dict[str, Contestant] = {
        "torch eager": ("peers.families:encode", {**spec, "compile": False}),
        "torch.compile": ("peers.families:encode", {**spec, "compile": True}),
        "onnxruntime": ("peers.onnxruntime:encode", spec),
    }
    return _rows(bench, "encode BERT base, 8 x 128", ("ours.families:encode", spec), peers)


def translate(bench: Bench) -> list[Row]:
    """New tokens a second of encoder-decoders, greedily and with beams."""
    rows = []
    for family in ("t5", "marian"):
        for beams, way in ((1, "greedy"), (4, "beam 4")):
            spec: dict[str, Any] = {"family": family, "beams": beams, "batch": 8, "source": 32, "new": 64}
            peers: dict[str, Contestant] = {
                "transformers generate": ("peers.families:decode", spec),
                "ctranslate2": ("peers.ctranslate2:decode", spec),
            }
            rows += _rows(bench, f"{family}, {way}, batch 8", ("ours.families:decode", spec), peers)
    return rows


def steps(bench: Bench) -> list[Row]:
    """Tokens a second of whole training steps."""
    rows = []
    for family in ("xlnet", "albert"):
        spec = {"family": family, "shape": [4, 128]}
        peers: dict[str, Contestant] = {"torch eager": ("peers.families:step", spec)}
        rows += _rows(bench, f"train {family}, 4 x 128", ("ours.families:step", spec), peers)
    return rows
