"""peft on torch: LoRA on all linear layers of SmolLM2-135M, or of a toy; weights are random."""

from typing import Any

import peft
import torch
import transformers

from experiments.benchmark.peers.runtime import DEVICE, adamw, autocast, median_seconds

TOY = dict(
    vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=64,
)  # fmt: skip
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536,
)  # fmt: skip


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an eager training step (fused AdamW on what trains, clipping)."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = TOY if spec["tiny"] else SMOLLM2
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, rope_theta=100000.0)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=spec["method"] == "DoRA")
    model: Any = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).to(DEVICE).train()
    rows, length = spec["shape"]
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), device=DEVICE)
    optimizer = adamw(model)
    learned = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(spec):
            logits = model(input_ids=ids[:, :-1].contiguous(), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return {"value": median_seconds(run, 5)}
