"""Llama 2 7B from scratch on a pod, as its paper trains it (AdamW, cosine, bfloat16 products over float32 weights).

Reproduces: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, table 1 and section 2.2 (sizes and optimizer).
Command:    python -m experiments.rehearse --topology=v5e:16x16 --config=experiments/configs/llama2_7b.py
            (also --topology=v5p:4x4x4 :v5p)
Cost:       not trained here: rehearsed without accelerators, about a minute and a half on two shared cores
Result:     (jax 0.10.2, libtpu 0.0.42.1) v5e:16x16, a row of 2,048 tokens a chip: 1.83 of 17.2 GB a chip; a step
            gathers 23.5 GB, 89 % of it behind computing, and scatters 14.7 GB of gradients (padded); at least 0.70 s of
            computing (0.04 of it attention's kernels), 0.19 s of moving: 673,000 tokens/s, MFU 0.55, at most 0.62 were
            nothing moved. With plan.explicit=False: 1.97 GB; 30.7 GB gathered, 13.7 GB all-reduced, which sends twice
            as much; 0.70 and 0.29 s; 610,000 tokens/s, MFU 0.50, at most 0.62.
            plan.remat=dots, objective.chunks=2: 7.2 GB, MFU 0.60, at most 0.70; with two rows (before that kept what
            attention's kernel returns) 12.5 GB, 0.57, 0.61.
            16 rows, objective.chunks=8: 14.6 GB, MFU 0.53; with the compiler's option
            xla_tpu_user_reserved_hbm_bytes=5000000000, which makes it recompute, 14.2 GB, 0.55. With
            plan.remat=offload:block 16 rows take 8.4 GB and 8.6 of host memory, and 28 rows fit: 15.4 GB and 15 in host
            memory, MFU 0.51 if that traffic hides.
            v5p:4x4x4, 4 rows of 4,096 (variant v5p): 9.3 of 102 GB; 23.5 GB gathered, 89 % of it behind computing with
            the options below and none without; 2.87 and 0.06 s; 362,000 tokens/s, MFU 0.53, at most 0.53.
            v5e:2x2, a row a chip, objective.chunks=8, --config.plan.offload="('update','parameters')",
            plan.master=in_optimizer, plan.explicit=False: 2.45 GB a chip and 26.7 of host memory.
            A pipeline, v5e:16x16, plan.pipe=4, plan.explicit=False, training.batch_size=1024, 16 micro-batches:
            plan.schedule  GB   computing, moving  MFU   at most
            1f1b           3.6  4.61 s  0.78 s     0.35  0.37
            eager_1f1b     3.6  3.48    0.77       0.45  0.49
            gpipe          4.6  3.54    0.78       0.44  0.48
            interleaved    3.7  3.24    0.78       0.48  0.53 (two chunks)
            zero_bubble    3.7  5.96    1.03       0.27  0.29
            of what moves 54 to 58 % is behind computing, of gathers 90 % (zero_bubble 83 %); 1f1b, gpipe and
            zero_bubble before norms kept their means, which spares the others 0.03 s
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.llama import LlamaConfig
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

SIZES: dict[str, Any] = dict(vocab_size=32000, context_length=4096, tied=False)


def pretraining(model: LlamaConfig, rate: float, plan: PlanConfig, rows: int, length: int) -> ConfigDict:
    """The paper's pre-training of a model."""
    return cli.as_config_dict(
        RunConfig(
            model=model,
            data=DataConfig(source="stdlib"),
            optimizer=OptimizerConfig("adamw", rate, warmup_steps=2000, b2=0.95, eps=1e-5, weight_decay=0.1),
            plan=plan,
            training=LoopConfig(steps=500_000, batch_size=rows, sequence_length=length),
        )
    )


# on chips of two cores gathers are fused with what both cores compute, and then nothing runs beside them
BESIDE = (
    "xla_tpu_megacore_fusion_allow_ags=false",
    "xla_enable_async_all_gather=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
)
PLAN = PlanConfig(zero=3, explicit=True, precision="bf16", remat="full")
VARIANTS: dict[str, tuple[PlanConfig, int, int]] = {  # plan, rows, tokens a row
    "v5e": (PLAN, 256, 2048),
    "v5p": (dataclasses.replace(PLAN, compiler=BESIDE), 256, 4096),
}


def get_config(variant: str = "v5e") -> ConfigDict:
    """A row of 2,048 tokens a chip of v5e:16x16, or 4 of 4,096 a chip of v5p:4x4x4."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    model = LlamaConfig(**SIZES, model_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, hidden_dim=11008)
    return pretraining(model, 3e-4, *VARIANTS[variant])
