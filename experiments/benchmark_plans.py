"""What a plan costs on one device: whole training steps of Llama 3.2 1B, or of a toy.

`python -m experiments.benchmark_plans SPEC` prints one JSON line: tokens a second, peak memory of the device, bytes of
state in host memory, and the loss after all steps, which plans must share.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from experiments import benchmark_ours
from experiments.benchmark_ours import median_seconds, peak_bytes, precision_of
from llm_jax.models.llama import LlamaConfig
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run import DataConfig, RunConfig

TINY = LlamaConfig(vocab_size=512, model_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=128)
LLAMA = LlamaConfig(  # Llama 3.2 1B
    vocab_size=128256, context_length=131072, model_dim=2048, num_layers=16, num_heads=32, num_kv_heads=8,
    hidden_dim=8192, rope_theta=500000.0, tied=True,
)  # fmt: skip
STEPS = 6


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Of `{plan, rows, length, chunks}`; `model` replaces fields of the model."""
    rows, length = (2, 64) if spec["tiny"] else (spec["rows"], spec["length"])
    own = {"precision": precision_of(spec).compute, **spec["plan"]}
    config = RunConfig(
        model=TINY if spec["tiny"] else LLAMA,
        data=DataConfig(source="stdlib"),
        objective=CausalLM(chunks=spec.get("chunks", 1)),
        optimizer=OptimizerConfig("adamw", 3e-4, warmup_steps=2, b2=0.95, weight_decay=0.1),
        plan=PlanConfig(**{**own, "offload": tuple(own.get("offload", ()))}),
        training=LoopConfig(steps=100, batch_size=rows, sequence_length=length),
    )
    plan = Plan(config.plan, config.model, jax.devices()[:1])
    program = build(config, plan, None)
    state = program.init(jax.random.key(0), None)
    held = {x.sharding.memory_kind: 0 for x in jax.tree.leaves(state)}
    for x in jax.tree.leaves(state):
        held[x.sharding.memory_kind] += x.nbytes if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else 0
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    batch, losses = {"input_ids": ids}, []

    def one() -> Any:
        nonlocal state
        state, metrics = program.step(state, batch)
        losses.append(metrics)
        return metrics["loss"]

    seconds = median_seconds(one, STEPS)
    return {
        "value": rows * length / seconds,
        "flops_per_token": program.flops_per_token,
        "peak_bytes": peak_bytes(),
        "held": held,
        "losses": [float(m["loss"]) for m in losses],
    }


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(measure(wanted) if wanted["what"] == "plan" else benchmark_ours.WHAT[wanted["what"]](wanted)))
