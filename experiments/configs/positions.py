"""The same small GPT with every encoding of positions: loss, speed, and what happens beyond the trained length.

Reproduces: the question of Press et al. 2021 (ALiBi), section 2 (train short, test long), at toy size.
Command:    python -m experiments.positions --workdir=runs/positions
            python -m experiments.train --config=experiments/configs/positions.py:rotary --workdir=runs/rotary
Cost:       20 minutes for all nine on two cores that other jobs shared (200 steps each)
Result:     nats a token on held-out files, then behind 1, 2 and 3 trained lengths (128 tokens):
            learned     3.849      -      -      -
            sinusoidal  3.832  3.963  4.093  4.127
            shaw        3.562  3.488  3.550  3.520
            t5          3.633  3.591  3.718  3.729
            xlnet       3.535  3.465  3.542  3.549
            deberta     3.566  3.490  3.557  3.528
            alibi       3.569  3.496  3.541  3.516
            rotary      3.587  3.531  3.644  3.665
            none        3.812  3.820  3.926  3.916
            Tokens/s through a gradient, in turns on idle cores: learned 13,961, sinusoidal 13,527, shaw 7,390, t5
            11,364, xlnet 9,989, deberta 8,848, alibi 13,801, rotary 13,480, none 13,711.
            What sees distances learns fastest and continues past the trained length (later tokens know more context, so
            3.5 behind 3.6 is as good as within); T5's buckets and rotary lose a little there, sinusoids most.
"""

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.gpt import GPTConfig
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig


def get_config(variant: str = "learned") -> ConfigDict:
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
