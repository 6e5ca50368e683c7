"""Llama configs: to Hugging Face's and back; what has no counterpart is an error."""

import pytest

from llm_jax.interop.huggingface.llama import config_from_hf, config_to_hf
from llm_jax.interop.names import InteropError
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.positions import RotaryScaling

SMALL = dict(vocab_size=31, context_length=64, model_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
             hidden_dim=40, rope_theta=500.0)  # fmt: skip
CONFIGS = [
    ("llama", {"tied": False, "norm_eps": 1e-6, "init_std": 0.1, "attention_dropout": 0.2}),
    ("llama", {"head_dim": 8, "activation": "gelu_tanh"}),
    ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_scaling": RotaryScaling("linear", 4.0, original_length=64)}),
    ("llama", {"rope_scaling": RotaryScaling("llama3", 8.0, 32, 1.5, 5.0)}),
    ("llama", {"rope_scaling": RotaryScaling("yarn", 4.0, 16, beta_fast=20.0, beta_slow=2.0)}),
    ("llama", {"rope_scaling": RotaryScaling("yarn", 4.0, 16, attention_factor=1.25, truncate=False)}),
    ("mistral", {"window": 5}),
    ("qwen2", {"qkv_bias": True}),
    ("qwen2", {"qkv_bias": True, "window": 7, "activation": "relu"}),
    ("qwen3", {"qk_norm": True}),
    ("qwen3", {"qk_norm": True, "qkv_bias": True, "out_bias": True, "window": 9}),
]


@pytest.mark.parametrize("kind, changes", CONFIGS, ids=str)
def test_configs_round_trip(kind, changes):
    config = LlamaConfig(**{**SMALL, **changes})
    theirs = config_to_hf(config)
    assert theirs["model_type"] == kind
    assert config_from_hf(theirs) == config


def minimal(kind="llama", **changes):
    return {"model_type": kind, "vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, **({} if kind == "llama" else {"num_key_value_heads": 4}), **changes}  # fmt: skip


READ = [
    ({}, {"num_kv_heads": 4, "head_dim": None, "tied": False, "rope_theta": 10000.0, "norm_eps": 1e-6, "window": None}),
    ({"num_key_value_heads": None, "sliding_window": 5}, {"num_kv_heads": 4, "window": None}),  # llama has no window
    ({"kind": "mistral", "sliding_window": None}, {"window": None}),
    ({"kind": "qwen2", "sliding_window": 5}, {"window": None, "qkv_bias": True, "out_bias": False}),  # not switched on
    ({"kind": "mistral"}, {"window": 4096}),
    # Qwen's windows begin at layer max_window_layers, the 28th where that is not said
    ({"kind": "qwen2", "sliding_window": 5, "use_sliding_window": True}, {"window": None}),
    ({"kind": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}, {"window": None}),
    ({"kind": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, {"window": 5}),
    ({"kind": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, {"window": 4096}),
    ({"kind": "qwen3", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, {"window": None}),
    ({"kind": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, {"window": None}),
    ({"kind": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, {"window": 4096}),
    ({"kind": "mistral", "attention_bias": True, "mlp_bias": True}, {"qkv_bias": False, "mlp_bias": False}),
    ({"kind": "qwen3"}, {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {"rope_theta": 7.0, "rope_scaling": None}),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "max_position_embeddings": 99},
     {"rope_scaling": RotaryScaling("linear", 2.0, 99)}),
]  # fmt: skip


@pytest.mark.parametrize("theirs, ours", READ, ids=str)
def test_what_their_fields_mean(theirs, ours):
    config = config_from_hf(minimal(**theirs))
    assert {k: getattr(config, k) for k in ours} == ours


UNREADABLE = [
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "yarn with mscale"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ({"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}}, "rope has partial_rotary_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1, 1]}}, "rope has mrope_section"),
    ({"rope_interleaved": True}, "rope_interleaved=true is not supported"),
    ({"kind": "mistral", "sliding_window": 5, "layer_types": ["full_attention"]}, "in some layers only"),
    ({"kind": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "in some layers only"),
    ({"kind": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]}, "must name .* for 2 layers"),
    (
        {"kind": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        "in some layers only",
    ),
    ({"kind": "qwen2", "layer_types": ["sliding_attention"] * 2}, "but use_sliding_window=false"),
    ({"kind": "qwen2", "layer_types": ["chunked_attention"] * 2}, "must name full_attention or sliding_attention"),
]


@pytest.mark.parametrize("changes, message", UNREADABLE)
def test_unsupported_features(changes, message):
    with pytest.raises(InteropError, match=message):
        config_from_hf(minimal(**changes))


UNWRITABLE = [
    ({"window": 5, "qkv_bias": True, "out_bias": True}, "combination of biases with mistral"),
    ({"window": 5, "mlp_bias": True}, "combination of biases with mistral"),
    ({"qkv_bias": True, "mlp_bias": True}, "combination of biases with qwen2"),
    ({"qk_norm": True, "mlp_bias": True}, "combination of biases with qwen3"),
    ({"qk_norm": True, "qkv_bias": True}, "qwen3 has biases on all"),
    ({"out_bias": True}, "biases"),
    ({"window": 5, "out_bias": True}, "biases"),
]


@pytest.mark.parametrize("changes, message", UNWRITABLE)
def test_what_no_architecture_can_say(changes, message):
    with pytest.raises(InteropError, match=message):
        config_to_hf(LlamaConfig(**{**SMALL, **changes}))
