"""The demonstration run: a small GPT on the Python standard library's own sources.

Reproduces: nothing in print; shows the whole path, text to samples.
Command:    make demo
Cost:       1.5 s a step, about 15 minutes on two cores; three are wanted
Result:     not yet run to the end
"""

from experiments import cli
from llm_jax.models.gpt import GPTConfig
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run import DataConfig, RunConfig


def get_config(variant: str = ""):
    """`tiny` runs in seconds (tests); the default is the demonstration."""
    model = GPTConfig(vocab_size=4096, context_length=256, model_dim=192, num_layers=4, num_heads=6)
    training = LoopConfig(steps=600, batch_size=16, sequence_length=256, eval_every=200, checkpoint_every=100)
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1)
    data = DataConfig(source="stdlib", validation_share=0.03)
    if variant == "tiny":
        model = GPTConfig(vocab_size=512, context_length=64, model_dim=32, num_layers=2, num_heads=2, dropout=0.1)
        training = LoopConfig(
            steps=20,
            batch_size=8,
            sequence_length=64,
            eval_every=10,
            eval_batches=2,
            checkpoint_every=5,
            log_every=5,
            accumulation=2,
        )
    elif variant:
        raise ValueError(f"variant {variant!r} is neither empty nor tiny")
    plan = PlanConfig(unroll=True)
    return cli.as_config_dict(RunConfig(model=model, data=data, optimizer=optimizer, plan=plan, training=training))
