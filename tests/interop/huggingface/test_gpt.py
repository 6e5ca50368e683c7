"""GPT configs: to Hugging Face's and back; what has no counterpart is an error."""

import pytest

from llm_jax.interop.huggingface.gpt import config_from_hf, config_to_hf
from llm_jax.interop.names import InteropError
from llm_jax.models.gpt import GPTConfig

SMALL = dict(vocab_size=31, context_length=16, model_dim=24, num_layers=3, num_heads=4)
CONFIGS = [
    GPTConfig(),
    GPTConfig(**SMALL, hidden_dim=50, activation="relu", tied=False, norm_eps=1e-6),
    GPTConfig(**SMALL, activation="gelu", dropout=0.2, attention_dropout=0.3, init_std=0.1),
    GPTConfig(**SMALL, activation="silu", dropout=0.1, embed_dropout=0.0),
    GPTConfig(**SMALL, norm="post"),
    GPTConfig(**SMALL, norm="post", activation="relu", tied=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_round_trip(config):
    theirs = config_to_hf(config)
    assert config_from_hf(theirs) == config
    assert theirs["model_type"] == ("gpt2" if config.norm == "pre" else "openai-gpt")


def test_defaults_are_theirs():
    """An empty config.json means the first published model of each kind."""
    assert config_from_hf({"model_type": "gpt2"}) == GPTConfig(dropout=0.1, attention_dropout=0.1)
    first = config_from_hf({"model_type": "openai-gpt"})
    assert (first.vocab_size, first.context_length, first.norm, first.activation) == (40478, 512, "post", "gelu_tanh")


ERRORS = [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true is not supported"),
    ({"add_cross_attention": True}, "add_cross_attention=true"),
    ({"scale_attn_weights": False}, "scale_attn_weights=false"),
    ({"rotary_dim": 4}, "config.json has rotary_dim, which this library does not know"),
    ({"activation_function": "mish"}, "activation 'mish' is not supported; there are gelu_new"),
]


@pytest.mark.parametrize("values, message", ERRORS)
def test_unsupported_features(values, message):
    with pytest.raises(InteropError, match=message):
        config_from_hf({"model_type": "gpt2", **values})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_dim": 50}, "no hidden_dim"),
        ({"activation": "gelu"}, "exact gelu"),
        ({"positions": "alibi"}, "learned positions and not positions='alibi'"),
    ],
)
def test_what_gpt1_cannot_say(changes, message):
    with pytest.raises(InteropError, match=message):
        config_to_hf(GPTConfig(**SMALL, norm="post", **changes))
