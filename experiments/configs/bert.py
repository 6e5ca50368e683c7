"""Small encoders pre-trained as their papers do: BERT, RoBERTa, ALBERT, DistilBERT without its teacher.

Reproduces: the objectives of Devlin et al. 2019 (masked LM with static masks, next sentence), Liu et al. 2019 (dynamic
            masks, full sentences, no pairs), Lan et al. 2020 (n-gram masks, sentence order, shared layers, factorised
            embedding) and Sanh et al. 2019 (masked LM with dynamic masks, no token types), at 2 million parameters.
Command:    python -m experiments.train --config=experiments/configs/bert.py:roberta --workdir=runs/roberta
            (:bert, :albert, :distilbert; --config.data.source='../shared/data/austen' for English)
            sentence order, on characters: ...:albert --config.data.source=../shared/data/tinyshakespeare/input.txt
                --config.data.split=tail --config.data.tokenizer_kind=char --config.model.vocab_size=100
                --config.model.num_layers=2 --config.training.sequence_length=64 --config.training.batch_size=32
                --config.training.steps=4000
Cost:       1,000 steps, two shared cores of an EPYC without AVX-512, other work beside them: 10 min 19 s (bert),
            9 min 13 s (roberta), 5 min 42 s (albert), 4 min 33 s (distilbert, two layers); albert on characters, with
            AVX-512 and tests beside it: 10 min 10 s
Result:     nats a masked token on held-out files of the standard library's sources (their token frequencies alone:
            5.89): bert 5.00, roberta 4.95, albert 5.00, distilbert 4.74, all still falling; bert tells the next
            sentence in 71 % of the pairs (a coin: 50 %), albert's sentence order is not learned there (51 %, and 52 %
            after 1,500 steps of 32 x 64), because a masked model learns nothing of its neighbours for long.
            Again on two cores of a Xeon, twice: bert 4.96 and 4.99, 75 % of the pairs; roberta 4.96 and 4.94.
            On characters it does after about 1,000 steps (3.1 to 1.71 nats; frequencies alone 3.36), and then the
            order: 49 to 53 % right until step 2,000, 80.2 % of held-out pairs at step 4,000
            (78.1 % on the Xeon)
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.bert import BertConfig
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

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


def get_config(variant: str = "bert") -> ConfigDict:
    """One of the four."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
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
