"""A small XLNet, pre-trained as its paper's: a sixth of the tokens in a random order, memories, both directions.

Reproduces: Yang et al. 2019, sections 2.2 to 2.4: two-stream attention, partial prediction (K = 6) of spans of up to
            five tokens, segment recurrence with reuse, half of the rows backwards.
Command:    python -m experiments.train --config=experiments/configs/xlnet.py --workdir=runs/xlnet
Cost:       500 steps, 8 min 46 s on two shared cores, other work beside them
Result:     2.89 nats a predicted token on held-out files of the standard library's sources (their token frequencies
            alone: 3.99; its Unigram vocabulary has many blanks), 57 % of them right, still falling
"""

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig


def get_config() -> ConfigDict:
    """On the standard library's sources."""
    return cli.as_config_dict(
        RunConfig(
            model=XLNetConfig(
                vocab_size=4096, model_dim=192, num_layers=4, num_heads=4, hidden_dim=768, dropout=0.0,
                memory_length=64, reuse_length=64,
            ),
            data=DataConfig(tokenizer_kind="unigram", validation_share=0.05),
            objective=PermutationLM(carry=True, both_ways=True),
            optimizer=OptimizerConfig("muon", 2e-2, warmup_steps=50, weight_decay=0.1),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=500, batch_size=16, sequence_length=128, log_every=20, eval_every=100, checkpoint_every=250,
                eval_batches=20,
            ),
        )
    )  # fmt: skip
