"""The same small GPT with every encoding of positions: loss, speed, and what happens beyond the trained length.

Reproduces: the question of Press et al. 2021 (ALiBi), section 2 (train short, test long), at toy size.
Command:    python -m experiments.positions --workdir=runs/positions
            python -m experiments.train --config=experiments/configs/positions.py:rotary --workdir=runs/rotary
Cost:       not run yet
Result:     not run yet
"""

from experiments import cli
from llm_jax.models.gpt import GPTConfig
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.rows import DataConfig
from llm_jax.training.run import RunConfig


def get_config(variant: str = "learned"):
    """The variant is the encoding, one of `models.gpt.POSITIONS`."""
    return cli.as_config_dict(
        RunConfig(
            model=GPTConfig(
                vocab_size=2048, context_length=128, model_dim=128, num_layers=4, num_heads=4, positions=variant,
                max_distance=64,
            ),
            data=DataConfig(source="stdlib", validation_share=0.03),
            optimizer=OptimizerConfig(name="muon", learning_rate=2e-2, warmup_steps=20, weight_decay=0.1),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=200, batch_size=16, sequence_length=128, eval_every=200, checkpoint_every=200, log_every=20,
                eval_batches=40
            ),
        )
    )  # fmt: skip
