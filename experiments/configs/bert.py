"""Small encoders pre-trained as their papers do: BERT, RoBERTa, ALBERT, DistilBERT without its teacher.

Reproduces: the objectives of Devlin et al. 2019 (masked LM with static masks, next sentence), Liu et al. 2019 (dynamic
            masks, full sentences, no pairs), Lan et al. 2020 (n-gram masks, sentence order, shared layers, factorised
            embedding) and Sanh et al. 2019 (masked LM with dynamic masks, no token types), at 2 million parameters.
Command:    python -m experiments.train --config=experiments/configs/bert.py:roberta --workdir=runs/roberta
            (:bert, :albert, :distilbert; --config.data.source='../shared/data/austen' for English)
"""

from typing import Any

from experiments import cli
from llm_jax.models.bert import BertConfig
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run import DataConfig, RunConfig

SIZES: dict[str, Any] = dict(
    vocab_size=4096, context_length=128, model_dim=192, num_layers=4, num_heads=4, hidden_dim=768, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
VARIANTS = {
    "bert": (BertConfig(**SIZES), DataConfig(pairs="next", mask_copies=10), MaskedLM()),
    "roberta": (
        BertConfig(**SIZES, num_token_types=1, position_offset=2, head="masked_lm", pooler=None),
        DataConfig(),
        MaskedLM(pair=0.0),
    ),
    "albert": (
        BertConfig(**SIZES, embedding_dim=64, num_groups=1, activation="gelu_tanh"),
        DataConfig(pairs="order"),
        MaskedLM(unit="spans"),
    ),
    "distilbert": (
        BertConfig(**{**SIZES, "num_layers": 2}, num_token_types=0, head="masked_lm", pooler=None),
        DataConfig(),
        MaskedLM(pair=0.0),
    ),
}


def get_config(variant: str = "bert"):
    """One of the four."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
    model, data, objective = VARIANTS[variant]
    data = DataConfig(**{**vars(data), "tokenizer_kind": "wordpiece", "validation_share": 0.05})
    return cli.as_config_dict(
        RunConfig(
            model=model,
            data=data,
            objective=objective,
            optimizer=OptimizerConfig("muon", 2e-2, warmup_steps=50, weight_decay=0.1),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=1000, batch_size=16, sequence_length=128, log_every=20, eval_every=200, checkpoint_every=500,
                eval_batches=20,
            ),
        )
    )  # fmt: skip
