"""A bank equals peft's mixed batches, and sums of LoRAs its weighted adapters."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from llm_jax import interop
from llm_jax.delta import bank, combine
from llm_jax.interop.huggingface import peft as peft_format

IDS = np.random.default_rng(0).integers(0, 61, (5, 9))
ADAPTERS = {
    "a": dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    "b": dict(r=2, lora_alpha=8, target_modules=["v_proj", "gate_proj"]),
    "c": dict(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(peft's model with three adapters, our model, our trees with one each)."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "base")
    first, *rest = ADAPTERS
    theirs = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS[first]), adapter_name=first)
    for name in rest:
        theirs.add_adapter(name, peft.LoraConfig(**ADAPTERS[name]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    theirs.save_pretrained(folder)
    base = interop.load(folder / "base")
    trees = {name: peft_format.load(folder / name, base.model, base.params) for name in ADAPTERS}
    return theirs.eval(), base.model, trees


def logits_of(model, params):
    return np.asarray(model.apply({"params": params}, jnp.asarray(IDS)).logits)


@pytest.mark.parametrize("rows", [["b", "a", "base", "c", "a"], ["c"] * 5, ["base", "b", "b", "base", "a"]])
def test_a_mixed_batch(both, rows):
    theirs, model, trees = both
    with torch.no_grad():
        names = ["__base__" if name == "base" else name for name in rows]
        want = theirs(torch.tensor(IDS), adapter_names=names).logits.numpy()
    params, known = bank.make(trees)
    np.testing.assert_allclose(logits_of(model, bank.choose(params, rows, known)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, rank", [("cat", None), ("svd", 3)])
def test_weighted_adapters(both, kind, rank):
    theirs, model, trees = both
    factors = {"a": 0.75, "b": 1.5, "c": 0.5}
    theirs.add_weighted_adapter(list(factors), list(factors.values()), kind, kind, svd_rank=rank)
    theirs.set_adapter(kind)
    with torch.no_grad():
        want = theirs(torch.tensor(IDS)).logits.numpy()
    each = [trees[name] for name in factors]
    add = combine.concatenated if rank is None else lambda t, f: combine.weighted(t, f, rank)
    np.testing.assert_allclose(logits_of(model, add(each, list(factors.values()))), want, rtol=1e-5, atol=1e-5)
