"""The peers' side of the benchmark: torch and transformers, the same model, batch and optimizer.

`python -m experiments.benchmark.peers SPEC` prints one JSON line, or exits with 42 where torch is not installed.
"""

import contextlib
import json
import math
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    import torch
    import transformers
except ImportError:
    sys.exit(42)

STEPS = 8
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def small(spec: dict[str, Any]) -> Any:
    """GPT-2 small without dropout, or a toy."""
    sizes = dict(vocab_size=500, n_embd=32, n_layer=2, n_head=2) if spec["tiny"] else {}
    torch.manual_seed(0)
    return _model(sizes)


def _model(sizes: dict[str, Any]) -> Any:
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config.bos_token_id = config.eos_token_id = None
    model: Any = transformers.GPT2LMHeadModel(config)
    return model.to(DEVICE)


def sizes(spec: dict[str, Any]) -> dict[str, int]:
    """Of this platform."""
    return spec["sizes"]["gpu" if CUDA else "cpu"]


def half(spec: dict[str, Any]) -> bool:
    """Whether products run in bfloat16."""
    return (spec["precision"] or ("bf16" if CUDA else "fp32")) == "bf16"


def autocast(spec: dict[str, Any]) -> Any:
    """Bfloat16 products with float32 parameters."""
    return torch.autocast(DEVICE, torch.bfloat16) if half(spec) else contextlib.nullcontext()


def wait() -> None:
    """For the device."""
    if CUDA:
        torch.cuda.synchronize()


def median_seconds(
    run: Callable[[], Any], count: int, warm: int = 2, pick: Callable[..., float] = statistics.median
) -> float:
    """Median (`pick=min`: the fastest) over `count` runs, after some to warm up."""
    times = []
    for i in range(warm + count):
        began = time.perf_counter()
        run()
        wait()
        if i >= warm:
            times.append(time.perf_counter() - began)
    return pick(times)


def make_step(model: Any, spec: dict[str, Any], rate: float = 3e-4, b2: float = 0.95, compiled: bool = True) -> Any:
    """One AdamW step with clipping, fused where torch has it."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, b2), fused=True)

    def loss_of(inputs: Any, labels: Any) -> Any:
        with autocast(spec):
            logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step(ids: Any, rate: float | None = None) -> Any:
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of whole steps."""
    model = small(spec).train()
    batch, length = sizes(spec)["rows"], sizes(spec)["length"]
    step = make_step(model, spec, compiled=spec["compile"])
    ids = torch.randint(0, model.config.vocab_size, (batch, length + 1), device=DEVICE)
    seconds = median_seconds(lambda: step(ids), STEPS)
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"value": batch * length / seconds, "peak_bytes": peak}


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second of `generate`, greedy, prefill included."""
    model = small(spec).eval()
    model = model.to(torch.bfloat16) if half(spec) else model
    ids = torch.randint(0, model.config.vocab_size, (spec["batch"], spec["prompt"]), device=DEVICE)
    options = dict(max_new_tokens=spec["new"], min_new_tokens=spec["new"], do_sample=False, pad_token_id=0)
    with torch.no_grad():
        seconds = median_seconds(lambda: model.generate(ids, **options), 3, warm=1)
    return {"value": spec["batch"] * spec["new"] / seconds}


def matmul(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a large product at its fastest: a limit."""
    n = 256 if spec["tiny"] else sizes(spec)["side"]
    x, w = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if half(spec) else None) for _ in range(2))
    return {"value": 2 * n**3 / median_seconds(lambda: x @ w, 10, pick=min)}


def shakespeare(spec: dict[str, Any]) -> dict[str, Any]:
    """The same setting as ours (see `benchmark_ours.shakespeare`)."""
    text = pathlib.Path(spec["path"]).read_text()
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[c] for c in text])
    cut = int(0.9 * len(ids))
    steps = 20 if spec["tiny"] else 2000
    torch.manual_seed(0)
    model = _model(dict(vocab_size=len(characters), n_positions=64, n_embd=128, n_layer=4, n_head=4)).train()
    step = make_step(model, spec, rate=1e-3, b2=0.99)
    began = time.perf_counter()
    for i in range(steps):
        starts = torch.randint(0, cut - 65, (12,)).tolist()
        cosine = 0.5 * (1 + math.cos(math.pi * (i - 100) / max(steps - 100, 1)))
        rate = 1e-3 * (i + 1) / 100 if i < 100 else 1e-4 + 9e-4 * cosine
        step(torch.stack([ids[s : s + 65] for s in starts]).to(DEVICE), rate)
    wait()
    seconds = time.perf_counter() - began
    held = ids[cut:]
    rows = torch.stack([held[i : i + 65] for i in range(0, len(held) - 65, 64)]).to(DEVICE)
    with torch.no_grad():
        logits = model.eval()(input_ids=rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return {"value": seconds, "loss": loss.item()}


WHAT = {"train": train, "decode": decode, "matmul": matmul, "shakespeare": shakespeare}

if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WHAT[wanted["what"]](wanted)))
