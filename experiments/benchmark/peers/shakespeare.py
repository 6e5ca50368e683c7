"""transformers' GPT-2 in nanoGPT's setting (see `ours.shakespeare`)."""

import math
import pathlib
import time
from typing import Any

import torch

from experiments.benchmark.peers.gpt2 import make_step, model_of
from experiments.benchmark.peers.runtime import DEVICE, wait


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of 2,000 steps, and `loss` on the whole validation part."""
    text = pathlib.Path(spec["path"]).read_text()
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[c] for c in text])
    cut = int(0.9 * len(ids))
    steps = 20 if spec["tiny"] else 2000
    torch.manual_seed(0)
    model = model_of(dict(vocab_size=len(characters), n_positions=64, n_embd=128, n_layer=4, n_head=4)).train()
    step = make_step(model, spec, rate=1e-3, b2=0.99)
    began = time.perf_counter()
    for i in range(steps):
        starts = torch.randint(0, cut - 65, (12,)).tolist()
        cosine = 0.5 * (1 + math.cos(math.pi * (i - 100) / max(steps - 100, 1)))
        rate = 1e-3 * (i + 1) / 100 if i < 100 else 1e-4 + 9e-4 * cosine
        step(torch.stack([ids[s : s + 65] for s in starts]).to(DEVICE), rate)
    wait()
    seconds = time.perf_counter() - began
    held_out = ids[cut:]
    rows = torch.stack([held_out[i : i + 65] for i in range(0, len(held_out) - 65, 64)]).to(DEVICE)
    with torch.no_grad():
        logits = model.eval()(input_ids=rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return {"value": seconds, "loss": loss.item()}
