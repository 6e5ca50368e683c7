"""Training steps and decoding of SmolLM2-135M, or of a toy, with deltas; weights are random."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.ours.runtime import fresh, median_seconds, peak_bytes, precision_of
from llm_jax.decoding.generate import Generator
from llm_jax.delta import bank, methods
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.delta.methods import DeltaConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import unstack
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.training import flops
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.state import TrainState, init_state
from llm_jax.training.step import Metrics, StepConfig, make_eval_step, make_train_step

TINY = LlamaConfig(vocab_size=500, model_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=64)
METHODS: dict[str, DeltaConfig] = {
    "whole": DeltaConfig(),
    "LoRA": DeltaConfig(lora=LoraConfig(rank=8)),
    "DoRA": DeltaConfig(lora=LoraConfig(rank=8, dora=True)),
    "forward": DeltaConfig(),
}


def _config(spec: dict[str, Any]) -> LlamaConfig:
    return TINY if spec["tiny"] else LlamaConfig()


def _program(spec: dict[str, Any], objective: CausalLM) -> tuple[Any, TrainState, tuple[str, ...] | None]:
    """(`(state, batch) -> (state, metrics)`, jitted, its first state, what trains).

    Each as it is faster on two CPU cores: the whole step unrolled (2.4 s, 2.9 scanned), LoRA's scanned (1.75 s, 1.95
    unrolled: it then keeps copies of all layers of the base, 1.5 GB of temporaries instead of 0.5).
    """
    config, delta, precision = _config(spec), METHODS[spec["method"]], precision_of(spec)
    model, tx = config.make(), make_optimizer(OptimizerConfig(), 100)
    params = methods.attach(fresh(model), delta, jax.random.key(2))
    trainable = methods.trainable(params, delta) or None
    state = jax.jit(lambda p, key: init_state(p, tx, key, precision, trainable))(params, jax.random.key(1))
    if spec["method"] == "forward":
        evaluate = make_eval_step(model, objective, precision)
        run = lambda state, batch: (state, evaluate(unstack(state.params), batch))
        return jax.jit(run, donate_argnums=0), state, None
    options = StepConfig(trainable=trainable, precision=precision, unroll=trainable is None)
    return jax.jit(make_train_step(model, objective, tx, options), donate_argnums=0), state, trainable


def _batch(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    rows, length = spec["shape"]
    ids = np.random.default_rng(0).integers(0, _config(spec).vocab_size, (rows, length + 1))
    return {"input_ids": ids.astype(np.int32)}


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a training step (AdamW, clipping), or of the loss alone."""
    run, state, _ = _program(spec, CausalLM(chunks=4))
    batch = _batch(spec)

    def advance() -> Metrics:
        nonlocal state
        state, metrics = run(state, batch)
        return metrics

    return {"value": median_seconds(advance, 5), "peak_bytes": peak_bytes()}


def count(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOPs and bytes of the compiled program, and our own count; nothing runs.

    The loss is in one piece, because XLA counts the body of a loop once.
    """
    objective, config, batch = CausalLM(chunks=1), _config(spec), _batch(spec)
    run, state, trainable = _program(spec, objective)
    found = run.lower(state, batch).compile().cost_analysis()
    ours = flops.of_step(config, objective, state.params, batch, trainable)
    counted = ours.forward if spec["method"] == "forward" else ours.total
    return {"value": found["flops"], "counted": counted, "bytes": found["bytes accessed"]}


def _adapter(base: Params, seed: int) -> Params:
    """LoRA of rank 8 on all linear layers, with a random B."""

    def drawn(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        return w.replace(b=0.01 * jax.random.normal(jax.random.key(seed), w.b.shape, w.b.dtype))

    params = methods.attach(base, METHODS["LoRA"], jax.random.key(seed))
    return jax.tree.map(drawn, params, is_leaf=weights.is_node)


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second of greedy decoding with so many `adapters`, prefill included; rows take turns."""
    config, rows, new = _config(spec), spec["batch"], spec["new"]
    dtype = precision_of(spec).dtype or jnp.float32
    params = weights.cast(fresh(config.make()), dtype)
    if spec["adapters"] == 1:
        params = weights.cast(_adapter(params, 0), dtype)
    elif spec["adapters"]:
        count = spec["adapters"]
        params, _ = bank.make({str(i): weights.cast(_adapter(params, i), dtype) for i in range(count)})
        params = bank.choose(params, [row % count for row in range(rows)])
    generator = Generator(config.make(), params, cache_dtype=dtype)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, spec["prompt"])).tolist()

    def run() -> Any:
        return generator.advance(generator.start(prompts, new, jax.random.key(0)), 2**30).tokens_BN

    seconds = median_seconds(run, 3)
    cache = weights.bytes_of(jax.eval_shape(lambda: config.init_cache(rows, spec["prompt"] + new, dtype)))
    return {"value": rows * new / seconds, "bytes_per_step": weights.bytes_of(params) + cache}
