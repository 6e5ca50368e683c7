"""Characters of Shakespeare: nanoGPT's small setting for a CPU.

Reproduces: nanoGPT's README (4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps: loss 1.88 in about three
            minutes on a laptop's CPU).
Command:    python -m experiments.train --config=experiments/configs/shakespeare.py --workdir=runs/shakespeare \
                --config.data.source=../shared/data/tinyshakespeare/input.txt
Cost:       151 s on two cores (the benchmark's loop, `--cases=shakespeare`)
Result:     in the benchmark's loop, over the whole held-out tenth, seeds 0 to 3: 1.915, 1.885, 1.897, 1.914;
            transformers' GPT-2 there 1.89. nanoGPT's figure is an estimate from 20 random batches: ten such estimates
            of seed 1 lie between 1.85 and 1.91. With Muon at 2e-2: 1.61
"""

from experiments import cli
from llm_jax.models.gpt import GPTConfig
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run import DataConfig, RunConfig


def get_config(variant: str = ""):
    """The last tenth of the file is held out, as there."""
    if variant:
        raise ValueError(f"there is no variant {variant!r}")
    return cli.as_config_dict(
        RunConfig(
            model=GPTConfig(vocab_size=65, context_length=64, model_dim=128, num_layers=4, num_heads=4),
            data=DataConfig(source="input.txt", tokenizer_kind="char", validation_share=0.1, split="tail"),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, b2=0.99),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=2000, batch_size=12, sequence_length=64, log_every=20, eval_every=500, checkpoint_every=500
            ),
        )
    )
