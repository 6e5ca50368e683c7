"""nanoGPT's character model, trained on its own split."""

import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmark.ours.runtime import fresh
from llm_jax.models.gpt import GPTConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of 2,000 steps, and `loss` on the whole validation part.

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
    held_out = ids[cut:]
    rows = np.stack([held_out[i : i + 65] for i in range(0, len(held_out) - 65, 64)])
    evaluate = jax.jit(make_eval_step(model, objective))
    scores, count = evaluate(state.params, {"input_ids": rows})
    return {"value": seconds, "loss": float(scores["next_token"] / count["next_token"])}
