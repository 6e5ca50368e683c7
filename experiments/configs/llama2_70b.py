"""Llama 2 70B on a pod: parameters over `data`, tensor parallelism over `model`.

Reproduces: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, table 1 and section 2.2 (sizes and optimizer).
Command:    python -m experiments.rehearse --topology=v5p:8x8x8 --config=experiments/configs/llama2_70b.py
Cost:       not trained here: rehearsed without accelerators, 41 s on two cores
Result:     (jax 0.10.2, libtpu 0.0.42.1) 4 rows of 4,096 tokens a chip, 128 x 4: 32.8 of 102 GB a chip; 513 GB
            gathered, 190 GB all-reduced, 279 GB permuted, 92 GB scattered a step; 26.2 s of computing at least, 1.9 of
            moving, 20 % of it hidden; 303,000 tokens/s, MFU 0.55, at most 0.58 were nothing moved. With
            plan.explicit=True: 35.3 GB, 30.4 s, MFU 0.50 (gathered heads are divided again over `model`).
            v5p:4x8x8, training.batch_size=1024: 35.2 GB, 25.7 and 1.8 s, MFU 0.56, at most 0.60
"""

from experiments.configs.llama2_7b import SIZES, pretraining
from llm_jax.models.llama import LlamaConfig
from llm_jax.parallel.plan import PlanConfig


def get_config(variant: str = ""):
    """4 rows of 4,096 tokens a chip of v5p:8x8x8 (512 chips: 128 x 4)."""
    if variant:
        raise ValueError(f"there is no variant {variant!r}")
    model = LlamaConfig(**SIZES, model_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden_dim=28672)
    return pretraining(model, 1.5e-4, PlanConfig(zero=3, model=4, precision="bf16", remat="full"), 2048, 4096)
