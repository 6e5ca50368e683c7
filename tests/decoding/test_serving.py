"""On a CPU serving transposes kernels, those under deltas too; no number changes."""

import functools

import jax
import numpy as np
import pytest
import tiny_models
from tiny_models import noise

from llm_jax.compress.quantize import Quantized, quantize
from llm_jax.decoding.serving import lay_out_params
from llm_jax.delta import bank, lora, methods, node
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.delta.methods import BitFitConfig, DeltaConfig, Ia3Config
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights

LLAMA = LlamaConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
LORA = LoraConfig(rank=3, targets=("all-linear", "embed"))


@functools.cache
def base():
    return noise(LLAMA.make(), 0.3)


def filled(params):
    """B and what else is zero or one at first drawn at random."""
    rng = np.random.default_rng(1)
    names = ("/b", "/factor", "/shift")
    draw = lambda p, x: x + rng.normal(size=x.shape).astype(np.float32) * 0.1 if p.endswith(names) else x
    return paths.map_with_path(draw, params)


def attached(config, params=None):
    return filled(methods.attach(base() if params is None else params, config, jax.random.key(0)))


def a_bank():
    return bank.choose(bank.make({"a": attached(DeltaConfig(lora=LoraConfig(rank=3)))})[0], [0, -1])


CASES = {
    "plain": base,
    "LoRA": lambda: attached(DeltaConfig(lora=LORA)),
    "DoRA": lambda: attached(DeltaConfig(lora=LoraConfig(rank=3, dora=True))),
    "mixed": lambda: attached(DeltaConfig(lora=LoraConfig(), ia3=Ia3Config(), bitfit=BitFitConfig())),
    "layers": lambda: attached(DeltaConfig(lora=LoraConfig(targets=("layers[1].mlp",)))),
    "bank": a_bank,
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_under_deltas_are_transposed_and_no_number_changes(name):
    params = CASES[name]()
    laid_out = lay_out_params(params)
    for path, w in paths.flatten(laid_out, weights.is_node):
        assert isinstance(node.stripped(w), weights.Transposed) == path.endswith("kernel"), path
        assert isinstance(w, node.Delta) or name in ("plain", "layers", "LoRA") or not path.endswith("kernel")
    want = np.asarray(tiny_models.logits(LLAMA, params, IDS))
    got = tiny_models.logits(LLAMA, laid_out, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_an_int8_base_stays_as_it_is():
    laid_out = lay_out_params(attached(DeltaConfig(lora=LoraConfig(rank=2)), quantize(base())))
    found = [w for _, w in paths.flatten(laid_out, weights.is_node) if isinstance(w, Lora)]
    assert len(found) == 2 * 7 and all(isinstance(w.base, Quantized) for w in found)
    assert all(isinstance(w, Quantized) for w in node.of(lora.detach(laid_out)).values())
