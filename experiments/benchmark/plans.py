"""What a plan costs on one device: whole training steps of Llama 3.2 1B, or of a toy.

`python -m experiments.benchmark.plans SPEC` prints one JSON line: tokens a second, peak memory of the device, bytes of
state by where they lie, and the losses of all steps, which plans share but for rounding.

On an NVIDIA H100 (80 GB; bfloat16 over float32 weights, 8 rows of 2,048 tokens, 4 chunks of the loss; jax 0.11.2; a
large product reaches 718 TFLOP/s, the data sheet says 989):
    plan                    tokens/s   MFU    peak GB   state on device and host, GB
    unrolled                  65,982   0.548     37.4   14.8
    scanned                   59,778   0.497     39.7   14.8
    remat=full                55,913   0.465     24.1   14.8
    remat=names:attention,mlp 55,879   0.464     25.0   14.8
    offload=optimizer         26,167   0.217     29.8    4.9 + 9.9
    offload=update             6,281   0.052     24.6    2.5 + 14.8 (Adam on 16 cores of the host; master=in_optimizer)
Of a later commit and another H100 of the kind (scanned 58,938, 39.7 GB):
    remat=dots                57,812   0.481     35.0   14.8 (keeps what attention's kernel returns)
    offload=update,parameters  3,975   0.033      6.0    0.5 + 16.8 (remat=full; parameters travel layer by layer)
32 rows, 16 chunks:
    remat=full                58,871   0.489     33.7   14.8
    remat=offload:block       53,447   0.444     29.4   14.8
Before the state waited for the layers, offload=optimizer held as much as none (39.7 GB).
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from experiments.benchmark.ours import median_seconds, peak_bytes, precision_of
from llm_jax.models.llama import LlamaConfig
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
LARGE = {"rows": 32, "length": 2048, "chunks": 16}
VARIANTS: dict[str, dict[str, Any]] = {  # fields of PlanConfig, and another shape
    "unrolled": {"plan": {"unroll": True}},
    "scanned": {},
    **{f"remat={kind}": {"plan": {"remat": kind}} for kind in ("dots", "full", "names:attention,mlp")},
    "offload=optimizer": {"plan": {"offload": ["optimizer"]}},
    "offload=update": {"plan": {"offload": ["update"], "master": "in_optimizer"}},
    "offload=update,parameters": {
        "plan": {"offload": ["update", "parameters"], "master": "in_optimizer", "remat": "full"}
    },
    **{f"remat={kind}, 32 rows": {"plan": {"remat": kind}, **LARGE} for kind in ("full", "offload:block")},
}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Of a variant's name."""
    spec = {**spec, "plan": {}, **SHAPE, **VARIANTS[spec["variant"]]}
    rows, length = (2, 64) if spec["tiny"] else (spec["rows"], spec["length"])
    own = {"precision": precision_of(spec).compute, **spec["plan"]}
    config = RunConfig(
        model=TINY if spec["tiny"] else LLAMA,
        data=DataConfig(source="stdlib"),
        objective=CausalLM(chunks=spec["chunks"]),
        optimizer=OptimizerConfig("adamw", 3e-4, warmup_steps=2, b2=0.95, weight_decay=0.1),
        plan=PlanConfig(**{**own, "offload": tuple(own.get("offload", ()))}),
        training=LoopConfig(steps=100, batch_size=rows, sequence_length=length),
    )
    plan = Plan(config.plan, config.model, jax.devices()[:1])
    program = build(config, plan, None)
    state = program.init(jax.random.key(0), None)
    held: dict[str, int] = {}
    for x in jax.tree.leaves(state.replace(key=None)):
        held[x.sharding.memory_kind] = held.get(x.sharding.memory_kind, 0) + x.nbytes
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
        "flops_per_token": flops.of_step(config.model, program.objective, program.params, batch).total
        / (rows * length),
        "peak_bytes": peak_bytes(),
        "held": held,
        "losses": [float(m["loss"]) for m in losses],
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
