"""Training steps of Llama 3.2 1B, or of a toy, under a plan for one device."""

from typing import Any

import jax
import numpy as np

from experiments.benchmark.ours.runtime import median_seconds, peak_bytes, precision_of
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.protocols import Batch
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training import flops
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run_config import DataConfig, RunConfig

TINY = LlamaConfig(vocab_size=512, model_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=128)
LLAMA = LlamaConfig(  # Llama 3.2 1B
    vocab_size=128256, context_length=131072, model_dim=2048, num_layers=16, num_heads=32, num_kv_heads=8,
    hidden_dim=8192, rope_theta=500000.0, tied=True,
)  # fmt: skip
STEPS = 6
SHAPE = {"rows": 8, "length": 2048, "chunks": 4}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second under `plan`, with `rows`, `length` and `chunks` where they are not `SHAPE`."""
    spec = {"plan": {}, **SHAPE, **spec}
    rows, length = (2, 64) if spec["tiny"] else (spec["rows"], spec["length"])
    fields = {"precision": precision_of(spec).compute, **spec["plan"]}
    config = RunConfig(
        model=TINY if spec["tiny"] else LLAMA,
        data=DataConfig(source="stdlib"),
        objective=CausalLM(chunks=spec["chunks"]),
        optimizer=OptimizerConfig("adamw", 3e-4, warmup_steps=2, b2=0.95, weight_decay=0.1),
        plan=PlanConfig(**{**fields, "offload": tuple(fields.get("offload", ()))}),
        training=LoopConfig(steps=100, batch_size=rows, sequence_length=length),
    )
    plan = Plan(config.plan, config.model, jax.devices()[:1])
    program = build(config, plan, None)
    state = program.init(jax.random.key(0), None)
    stored: dict[str, int] = {}
    for x in jax.tree.leaves(state.replace(key=None)):
        stored[x.sharding.memory_kind] = stored.get(x.sharding.memory_kind, 0) + x.nbytes
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    batch: Batch = {"input_ids": jax.device_put(ids)}
    losses = []

    def run() -> Any:
        nonlocal state
        state, metrics = program.step(state, batch)
        losses.append(metrics)
        return metrics["loss"]

    seconds = median_seconds(run, STEPS)
    counted = flops.of_step(config.model, program.objective, program.params, batch)
    return {
        "value": rows * length / seconds,
        "flops_per_token": counted.total / (rows * length),
        "peak_bytes": peak_bytes(),
        "state_bytes": stored,
        "losses": [float(m["loss"]) for m in losses],
    }
