"""Large models on pods, as their papers size them: rehearsed, not trained.

Reproduces: the sizes of Llama 3 8B (Grattafiori et al. 2024, table 3; `long` with rows of 32,768 tokens along rings of
            8), GPT-3 175B (Brown et al. 2020, table 2.1; dense attention in all layers), T5 11B (Raffel et al. 2020,
            section 3.7) and BERT large (Devlin et al. 2019, section 3).
Command:    python -m experiments.rehearse --topology=v5p:4x4x8 --config=experiments/configs/pods.py:llama3_8b
            (also v6e:16x16; v5p:4x4x8 :llama3_8b_long; v5p:8x8x8 :gpt3_175b; v5p:4x8x8 :t5_11b; v5e:16x16 :bert_large)
Cost:       a minute and a half each on two cores with other work beside it, T5 four
Result:     (jax 0.10.2, libtpu 0.0.42.1) GB a chip; GB gathered, all-reduced, permuted a step; seconds of computing and
            of moving at least; tokens/s; MFU and its bound were nothing moved:
            llama3_8b       v5p:4x4x8  10.7;  32.7  17.1    0;   3.12  0.11;    649,000; 0.57 0.59
            llama3_8b       v6e:16x16   6.4;  31.1  18.7    0;   1.05  0.17;  1,724,000; 0.38 0.44
            llama3_8b_long  v5p:4x4x8   5.1;  32.7  16.1   27;   7.16  0.15;     72,000; 0.09 0.09 (an upper bound of
                            the time: the compiler counts chunks that a causal mask skips; and the chunks are its own
                            products, not a kernel). Rows of 131,072: 11.8 GB, 124 s
            gpt3_175b       v5p:8x8x8  19.7;   723  5.0     0;  14.2   1.72;    132,000; 0.60 0.67; 430 GB scattered
                            (without the option that llama2_70b.py explains 22.6 s a step)
            t5_11b          v5p:4x8x8   4.9;  51.9  3.9     0;   1.42  0.23;    636,000; 0.38 0.44; 81 GB all-to-all,
                            13 GB scattered
            bert_large      v5e:16x16   3.6;   1.3   0.8    0;   0.33  0.02;  6,129,000; 0.24 0.25 (heads of 64, which
                            the attention kernel does not take)
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from experiments.configs.llama2_70b import WHOLE
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.t5 import T5Config
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

LLAMA3 = LlamaConfig(
    vocab_size=128256, context_length=131072, model_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
    hidden_dim=14336, rope_theta=500000.0, tied=False,
)  # fmt: skip
GPT3 = GPTConfig(
    vocab_size=50257, vocab_pad_multiple=128, context_length=2048, model_dim=12288, num_layers=96, num_heads=96,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
T5_11B = T5Config(
    vocab_size=32128, context_length=512, model_dim=1024, num_layers=24, num_heads=128, head_dim=128,
    hidden_dim=65536, dropout=0.0,
)  # fmt: skip
BERT_LARGE = BertConfig(
    vocab_size=30522, vocab_pad_multiple=64, context_length=512, model_dim=1024, num_layers=24, num_heads=16,
    hidden_dim=4096, dropout=0.0, attention_dropout=0.0, head="masked_lm", pooler=None,
)  # fmt: skip
PLAN = PlanConfig(zero=3, precision="bf16", remat="full")
VARIANTS: dict[str, tuple[Any, Any, PlanConfig, int, int]] = {  # model, objective, plan, rows, tokens a row
    "llama3_8b": (LLAMA3, CausalLM(), PLAN, 256, 8192),
    "llama3_8b_long": (LLAMA3, CausalLM(), dataclasses.replace(PLAN, seq=8), 16, 32768),
    "gpt3_175b": (GPT3, CausalLM(chunks=4), dataclasses.replace(PLAN, model=8, compiler=WHOLE), 1024, 2048),
    "t5_11b": (
        *(T5_11B, Seq2Seq(task="spans", end_id=1)),
        *(dataclasses.replace(PLAN, model=8, compiler=WHOLE), 2048, 512),
    ),
    "bert_large": (BERT_LARGE, MaskedLM(pair=0.0), dataclasses.replace(PLAN, zero=1), 4096, 512),
}


def get_config(variant: str = "llama3_8b") -> ConfigDict:
    """One of the five."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    model, objective, plan, rows, length = VARIANTS[variant]
    return cli.as_config_dict(
        RunConfig(
            model=model,
            data=DataConfig(source="stdlib"),
            objective=objective,
            optimizer=OptimizerConfig("adamw", 3e-4, warmup_steps=2000, b2=0.95, weight_decay=0.1),
            plan=plan,
            training=LoopConfig(steps=500_000, batch_size=rows, sequence_length=length),
        )
    )
