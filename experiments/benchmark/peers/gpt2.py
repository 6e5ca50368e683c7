"""GPT-2 small in torch and transformers: training steps, decoding, a product."""

import resource
from typing import Any

import torch
import transformers

from experiments.benchmark.peers.runtime import CUDA, DEVICE, adamw, autocast, half, median_seconds, sizes

STEPS = 8


def model_of(sizes: dict[str, Any]) -> Any:
    """GPT-2 of these sizes, without dropout."""
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config.bos_token_id = config.eos_token_id = None
    model: Any = transformers.GPT2LMHeadModel(config)
    return model.to(DEVICE)


def small(spec: dict[str, Any]) -> Any:
    """GPT-2 small without dropout, or a toy."""
    toy = dict(vocab_size=500, n_embd=32, n_layer=2, n_head=2) if spec["tiny"] else {}
    torch.manual_seed(0)
    return model_of(toy)


def make_step(model: Any, spec: dict[str, Any], rate: float = 3e-4, b2: float = 0.95, compiled: bool = True) -> Any:
    """One AdamW step with clipping, fused where torch has it."""
    optimizer = adamw(model, rate, b2)

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
    batch, length, _ = sizes()
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
    n = 256 if spec["tiny"] else sizes().side
    x, w = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if half(spec) else None) for _ in range(2))
    return {"value": 2 * n**3 / median_seconds(lambda: x @ w, 10, pick=min)}
