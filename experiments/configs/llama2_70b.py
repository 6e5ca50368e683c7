"""Llama 2 70B on a pod: parameters over `data`, tensor parallelism over `model`.

Reproduces: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, table 1 and section 2.2 (sizes and optimizer).
Command:    python -m experiments.rehearse --topology=v5p:8x8x8 --config=experiments/configs/llama2_70b.py
Cost:       not trained here: rehearsed without accelerators, 41 s on two cores
Result:     (jax 0.10.2, libtpu 0.0.42.1) 4 rows of 4,096 tokens a chip, 128 x 4: 34.8 of 102 GB a chip; 676 GB
            gathered, 464 GB scattered, 2 GB all-reduced a step; 25.0 s of computing at least, 1.5 of moving, none of it
            hidden; 317,000 tokens/s, MFU 0.58, at most 0.61 were nothing moved. Without the option below: 36.9 GB,
            25.4 and 1.8 s, 27 % hidden, 314,000 tokens/s. With plan.explicit=True: 35.7 GB, 25.0 and 2.4 s, MFU 0.56.
            v5p:4x8x8, training.batch_size=1024: 37.2 GB, 24.8 and 1.5 s, MFU 0.58, at most 0.62
"""

from ml_collections import ConfigDict

from experiments.configs.llama2_7b import SIZES, pretraining
from llm_jax.models.llama import LlamaConfig
from llm_jax.parallel.plan import PlanConfig

# gather before products that are divided over `model`, and scatter behind them: cut into as many pieces as devices,
# which the compiler does by itself, they take up to twice as long by its own count
WHOLE = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)


def get_config(variant: str = "") -> ConfigDict:
    """4 rows of 4,096 tokens a chip of v5p:8x8x8 (512 chips: 128 x 4)."""
    if variant:
        raise ValueError(f"there is no variant {variant!r}")
    model = LlamaConfig(**SIZES, model_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden_dim=28672)
    plan = PlanConfig(zero=3, model=4, precision="bf16", remat="full", compiler=WHOLE)
    return pretraining(model, 1.5e-4, plan, 2048, 4096)
