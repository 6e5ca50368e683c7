"""Our side of the benchmark: `python -m experiments.benchmark.ours SPEC` prints one JSON line.

What each lever gave is recorded in `experiments/benchmark/__main__.py`.
"""

import functools
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding.generate import Generator
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import weights
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.training import flops
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.precision import Precision
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step

STEPS = 8
OBJECTIVE = CausalLM(chunks=4)


def small(spec: dict[str, Any]) -> GPTConfig:
    """GPT-2 small, or a toy."""
    if spec["tiny"]:
        return GPTConfig(vocab_size=500, model_dim=32, num_layers=2, num_heads=2)
    # rows of 50,257 bfloat16 are not aligned, and cuBLAS cannot read them fast
    return GPTConfig(num_layers=spec.get("layers", 12), vocab_pad_multiple=1 if on_cpu() else 128)


def on_cpu() -> bool:
    """Whether this is the CPU."""
    return jax.devices()[0].platform == "cpu"


def sizes(spec: dict[str, Any]) -> dict[str, int]:
    """Of this platform."""
    return spec["sizes"]["cpu" if on_cpu() else "gpu"]


def precision_of(spec: dict[str, Any]) -> Precision:
    """Float32 on a CPU, bfloat16 with float32 parameters elsewhere, or as asked."""
    return Precision(spec["precision"] or ("fp32" if on_cpu() else "bf16"))


def fresh(model: Any) -> Any:
    """Initialised parameters."""
    init = jax.jit(lambda key: weights.split_axes(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])[0])
    return init(jax.random.key(0))


def peak_bytes() -> int:
    """Peak memory: of the process on a CPU, of the device elsewhere."""
    if on_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


def median_seconds(run: Callable[[], Any], count: int, pick: Callable[..., float] = statistics.median) -> float:
    """Median (`pick=min`: the fastest) over `count` runs, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(count):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return pick(times)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of whole steps (AdamW, clipping)."""
    config = small(spec)
    model, tx, precision = config.make(), make_optimizer(OptimizerConfig(), 100), precision_of(spec)
    state = jax.jit(lambda key: init_state(fresh(model), tx, key, precision))(jax.random.key(1))
    batch, length = sizes(spec)["rows"], sizes(spec)["length"]
    options = StepConfig(precision=precision, unroll=spec["unroll"])
    step = jax.jit(make_train_step(model, OBJECTIVE, tx, options), donate_argnums=0)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1)).astype(np.int32)

    def one() -> Any:
        nonlocal state
        state, metrics = step(state, {"input_ids": ids})
        return metrics

    seconds = median_seconds(one, STEPS)
    counted = flops.of_step(config, OBJECTIVE, state.params, {"input_ids": ids})
    per_token = counted.total / (batch * length)
    return {"value": batch * length / seconds, "flops_per_token": per_token, "peak_bytes": peak_bytes()}


def compile_seconds(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds from trace to executable of the training step."""
    config, shape = small(spec), (sizes(spec)["rows"], sizes(spec)["length"] + 1)
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
    run = lambda: generator.advance(generator.start(prompts, new, jax.random.key(0)), 2**30).tokens_BN
    seconds = median_seconds(run, 3)
    cache = weights.bytes_of(jax.eval_shape(lambda: config.init_cache(batch, spec["prompt"] + new, dtype)))
    read = weights.bytes_of({k: v for k, v in params.items() if k != "positions"}) + cache
    return {"value": batch * new / seconds, "bytes_per_step": read}


def matmul(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a large product at its fastest: a limit."""
    n = 256 if spec["tiny"] else sizes(spec)["side"]
    dtype = precision_of(spec).dtype
    x, w = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    return {"value": 2 * n**3 / median_seconds(functools.partial(jax.jit(jnp.dot), x, w), 10, min)}


def bandwidth(spec: dict[str, Any]) -> dict[str, Any]:
    """Bytes per second of a matrix-vector product too large for any cache, the access pattern of decoding."""
    n = 256 if spec["tiny"] else 16384
    w, x = jnp.ones((n, n), jnp.float32), jnp.ones((n,), jnp.float32)
    return {"value": 4 * n * n / median_seconds(functools.partial(jax.jit(lambda w, x: w @ x), w, x), 10, min)}


def shakespeare(spec: dict[str, Any]) -> dict[str, Any]:
    """NanoGPT's character model on its own split; seconds of 2,000 steps and the loss on the whole validation part.

    4 layers, 4 heads, width 128, context 64, batch 12, AdamW 1e-3 to 1e-4 (cosine, 100 steps of warm-up, beta2 0.99,
    decay 0.1), no dropout, as its README's CPU command and `config/train_shakespeare_char.py` say; `optimizer` and
    `learning_rate` of the spec take another optimizer or peak rate and change nothing else.
    """
    text = pathlib.Path(spec["path"]).read_text()
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([characters[c] for c in text], np.int32)
    cut = int(0.9 * len(ids))
    steps = 20 if spec["tiny"] else 2000
    config = GPTConfig(vocab_size=len(characters), context_length=64, model_dim=128, num_layers=4, num_heads=4)
    model, objective = config.make(), CausalLM()
    tx = make_optimizer(OptimizerConfig(spec["optimizer"], spec["learning_rate"], warmup_steps=100, b2=0.99), steps)
    state = init_state(fresh(model), tx, jax.random.key(1))
    step = jax.jit(make_train_step(model, objective, tx, StepConfig(unroll=True)), donate_argnums=0)
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(steps):
        starts = rng.integers(0, cut - 65, 12)
        state, metrics = step(state, {"input_ids": np.stack([ids[i : i + 65] for i in starts])})
        jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    held = ids[cut:]
    rows = np.stack([held[i : i + 65] for i in range(0, len(held) - 65, 64)])
    evaluate = jax.jit(make_eval_step(model, objective))
    scores, count = evaluate(state.params, {"input_ids": rows})
    return {"value": seconds, "loss": float(scores["next_token"] / count["next_token"])}


def device(spec: dict[str, Any]) -> dict[str, Any]:
    """Name of the hardware, and its platform."""
    del spec
    name = jax.devices()[0].device_kind
    if on_cpu():
        with open("/proc/cpuinfo") as f:
            models = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = f"{len(models)} cores of {models[0] if models else 'an unnamed CPU'}"
    return {"value": f"{name}, jax {jax.__version__}", "platform": jax.devices()[0].platform}


WHAT = {
    "train": train, "compile": compile_seconds, "decode": decode, "matmul": matmul, "bandwidth": bandwidth,
    "shakespeare": shakespeare, "device": device,
}  # fmt: skip

if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WHAT[wanted["what"]](wanted)))
