"""A small ELMo, pre-trained as its paper's: two LSTM language models over words spelled in characters.

Reproduces: Peters et al. 2018, section 3: character CNN with highways, two layers a direction with projections,
            residuals and clips, one output layer for both directions, sampled softmax, states that run on.
Command:    python -m experiments.train --config=experiments/configs/elmo.py --workdir=runs/elmo
Cost:       600 steps, 7 min 34 s on two shared cores, other work beside them
Result:     4.95 nats a word on the ends of the novels with the full softmax (forward 4.93, backward 4.98; word
            frequencies alone: 6.19), still falling
"""

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.elmo import ElmoConfig
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig


def get_config() -> ConfigDict:
    """On the novels of Jane Austen, the end of each held out."""
    return cli.as_config_dict(
        RunConfig(
            model=ElmoConfig(
                vocab_size=8000, max_characters=20, character_dim=16, widths=(1, 2, 3, 4), filters=(32, 32, 64, 128),
                num_highways=1, model_dim=128, hidden_dim=512, dropout=0.1,
            ),
            data=DataConfig(
                source="../shared/data/austen", tokenizer_kind="word", validation_share=0.03, split="tail",
            ),
            objective=BidirectionalLM(samples=1024, carry=True),
            optimizer=OptimizerConfig("adamw", 3e-3, warmup_steps=50, weight_decay=0.0),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=600, batch_size=32, sequence_length=32, log_every=20, eval_every=100, checkpoint_every=300,
                eval_batches=20,
            ),
        )
    )  # fmt: skip
