"""Small T5s, pre-trained as their papers': 1.0 and 1.1 by span corruption, and the LM-adapted form by prefixes.

Reproduces: Raffel et al. 2020, sections 2.1 and 3.1.4: 15 % in spans of 3, relative positions; Lester et al.
            2021: prefix LM. Muon replaces Adafactor, which at 1e-2 stood at 5.52 after 400 steps.
Command:    python -m experiments.train --config=experiments/configs/t5.py:1.1 --workdir=runs/t5 (:1.0, :prefix)
Cost:       250 steps, two shared cores, other work beside them: 3 min 11 s (1.0), 3 min 23 s (1.1), 5 min 27 s (prefix)
Result:     nats a target token on held-out files of the standard library's sources: 4.73 (1.0), 4.66 (1.1), where
            the frequencies of the targets alone give 6.15; 4.74 (prefix) against 6.95. A quarter of the
            targets of span corruption are sentinels and ends, which are learned at once. All still falling.
            Again on two cores of a Xeon: 4.77 (1.0), 4.74 (prefix)
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.t5 import T5Config
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

SIZES: dict[str, Any] = dict(
    vocab_size=4096, context_length=128, model_dim=192, num_layers=3, num_heads=4, head_dim=48, hidden_dim=768,
    dropout=0.0,
)  # fmt: skip
GATED = dict(activation="gelu_tanh", gated=True, tied=False, scale_output=False, hidden_dim=512)
VARIANTS = {
    "1.0": (T5Config(**SIZES), Seq2Seq(task="spans", end_id=0)),
    "1.1": (T5Config(**{**SIZES, **GATED}), Seq2Seq(task="spans", end_id=0)),
    "prefix": (T5Config(**{**SIZES, **GATED}), Seq2Seq(task="prefix")),
}


def get_config(variant: str = "1.0") -> ConfigDict:
    """One of the three, on the standard library's sources."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    model, objective = VARIANTS[variant]
    return cli.as_config_dict(
        RunConfig(
            model=model,
            data=DataConfig(tokenizer_kind="bpe", validation_share=0.05),
            objective=objective,
            optimizer=OptimizerConfig("muon", 2e-2, warmup_steps=50, weight_decay=0.1),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=250, batch_size=16, sequence_length=128, log_every=10, eval_every=50, checkpoint_every=250,
                eval_batches=20,
            ),
        )
    )  # fmt: skip
