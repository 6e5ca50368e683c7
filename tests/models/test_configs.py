"""Configs of all families: what they refuse, initial scales, caches."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_models import GPT, LLAMA, MODELS

from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights


@pytest.mark.parametrize(
    "cls, changes, words",
    [
        (GPTConfig, {"num_heads": 5}, "model_dim=12 is not a multiple of num_heads=5"),
        (GPTConfig, {"norm": "both"}, "norm='both' is neither pre nor post"),
        (GPTConfig, {"activation": "swish"}, "activation='swish' is not one of gelu, "),
        (GPTConfig, {"positions": "absolute"}, "positions='absolute' is not one of learned, sinusoidal, rotary, alibi"),
        (LlamaConfig, {"num_heads": 5}, "model_dim=12 is not a multiple of num_heads=5"),
        (LlamaConfig, {"activation": "swish"}, "activation='swish' is not one of"),
        (LlamaConfig, {"window": 0}, "window=0 must be at least 1"),
        (LlamaConfig, {"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
    ],
)
def test_refused(cls, changes, words):
    with pytest.raises(ValueError, match=words):
        cls(**{**(GPT if cls is GPTConfig else LLAMA), **changes})


def test_a_cache_is_no_longer_than_learned_positions():
    with pytest.raises(ValueError, match="a cache of 17 exceeds the 16 learned positions"):
        MODELS["gpt2"].init_cache(1, 17)
    shapes = jax.eval_shape(lambda: MODELS["qwen3"].init_cache(3, 40, "bfloat16"))
    assert shapes.layers[1].k_BKSH.shape == (3, 2, 40, 4) and shapes.layers[1].k_BKSH.dtype == "bfloat16"


@pytest.mark.parametrize("norm, shrink", [("pre", math.sqrt(2 * 3)), ("post", 1)])
def test_initial_scales(norm, shrink):
    """GPT-2 writes into the residual stream with smaller kernels; 4 deviations of a deviation's estimate."""
    config = dataclasses.replace(MODELS["gpt2"], model_dim=24, num_layers=3, norm=norm)
    boxed = jax.jit(config.make().init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    params, _ = weights.split_axes(jax.device_get(boxed))
    for path, x in paths.flatten(params):
        if path.endswith(("kernel", "embedding")):
            want = config.init_std / (shrink if path.endswith(("out/kernel", "down/kernel")) else 1)
            assert abs(x.std() / want - 1) < 4 / math.sqrt(2 * x.size), path
            assert abs(x.mean()) < 4 * want / math.sqrt(x.size), path
        else:
            assert (x == path.endswith("scale")).all(), path
    kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])  # every layer has its own draw
