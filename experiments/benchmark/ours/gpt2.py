"""GPT-2 small: training steps, their compilation, decoding."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.ours.runtime import fresh, median_seconds, on_cpu, peak_bytes, precision_of, sizes
from llm_jax.decoding.generate import Generator
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import weights
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.training import flops
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

STEPS = 8
OBJECTIVE = CausalLM(chunks=4)


def small(spec: dict[str, Any]) -> GPTConfig:
    """GPT-2 small, or a toy."""
    if spec["tiny"]:
        return GPTConfig(vocab_size=500, model_dim=32, num_layers=2, num_heads=2)
    # rows of 50,257 bfloat16 are not aligned, and cuBLAS cannot read them fast
    return GPTConfig(num_layers=spec.get("layers", 12), vocab_pad_multiple=1 if on_cpu() else 128)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of whole steps (AdamW, clipping)."""
    config = small(spec)
    model, tx, precision = config.make(), make_optimizer(OptimizerConfig(), 100), precision_of(spec)
    state = jax.jit(lambda key: init_state(fresh(model), tx, key, precision))(jax.random.key(1))
    batch, length, _ = sizes()
    options = StepConfig(precision=precision, unroll=spec["unroll"])
    step = jax.jit(make_train_step(model, OBJECTIVE, tx, options), donate_argnums=0)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1)).astype(np.int32)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, {"input_ids": ids})
        return metrics

    seconds = median_seconds(run, STEPS)
    counted = flops.of_step(config, OBJECTIVE, state.params, {"input_ids": ids})
    per_token = counted.total / (batch * length)
    return {"value": batch * length / seconds, "flops_per_token": per_token, "peak_bytes": peak_bytes()}


def compile_time(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds from trace to executable of the training step."""
    config, shape = small(spec), (sizes().rows, sizes().length + 1)
    model, tx = config.make(), make_optimizer(OptimizerConfig(), 100)
    state = jax.eval_shape(lambda key: init_state(fresh(model), tx, key), jax.random.key(1))
    step = jax.jit(make_train_step(model, OBJECTIVE, tx, StepConfig(unroll=spec["unroll"])), donate_argnums=0)
    began = time.perf_counter()
    step.lower(state, {"input_ids": jax.ShapeDtypeStruct(shape, jnp.int32)}).compile()
    return {"value": time.perf_counter() - began}


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second of greedy decoding, prefill included."""
    config, batch, new = small(spec), spec["batch"], spec["new"]
    dtype = precision_of(spec).dtype
    params = weights.cast(fresh(config.make()), dtype)
    generator = Generator(config.make(), params, cache_dtype=dtype)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, spec["prompt"])).tolist()

    def run() -> Any:
        return generator.advance(generator.start(prompts, new, jax.random.key(0)), 2**30).tokens_BN

    seconds = median_seconds(run, 3)
    cache = weights.bytes_of(jax.eval_shape(lambda: config.init_cache(batch, spec["prompt"] + new, dtype)))
    read = weights.bytes_of({k: v for k, v in params.items() if k != "positions"}) + cache
    return {"value": batch * new / seconds, "bytes_per_step": read}
