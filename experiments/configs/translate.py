"""The Transformer of 2017 learns to translate: English to Spanish, on the aligned verses of a Bible.

Reproduces: Vaswani et al. 2017 in small: shared BPE vocabulary and table, post-norm, sinusoids, dropout before each
            residual sum, label smoothing 0.1, Adam (0.9, 0.98) with the Noam schedule, averaged checkpoints, beam 4.
Command:    python -m experiments.train --config=experiments/configs/translate.py --workdir=runs/translate
            python -m experiments.translate --workdir=runs/translate --average_last=5
Cost:       2,000 steps (two and a half times through the text), 33 min 39 s on two shared cores, other work beside them
Result:     3.35 nats a token of the held-out chapters (their token frequencies alone: 6.58), still falling. BLEU
            (sacrebleu, lower case) of the first 300 held-out pairs: greedy 14.6, beam 4 18.1 (gnmt penalty 0.6); word
            by word, by model 1 of Brown et al., 14.5. The mean of the last five checkpoints changes nothing here (14.6
            and 18.1): they are 100 steps apart. A factor of 1.0 in front of the schedule, instead of 0.3, learned
            slower: 4.87 against 4.54 nats after 600 steps. Again on two cores of a Xeon: 3.37 and 3.36 nats; beam 4
            over the mean of the last five checkpoints 17.3 and 17.4.
"""

from ml_collections import ConfigDict

from experiments import cli
from llm_jax.models.transformer import TransformerConfig
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig

LENGTH = 48


def get_config(variant: str = "bible") -> ConfigDict:
    """`bible`: 30,687 verse pairs; chapters are held out whole."""
    if variant != "bible":
        raise ValueError(f"variant {variant!r} is not bible")
    return cli.as_config_dict(
        RunConfig(
            model=TransformerConfig(
                vocab_size=8000, context_length=128, model_dim=256, num_layers=3, num_heads=4, hidden_dim=1024,
                dropout=0.1,
            ),
            data=DataConfig(
                source="../shared/data/bible_en_es/kjv_rv1909.tsv.gz", validation_share=0.03, fields=("en", "es"),
                group=r"ref:\w+\.\d+",
            ),
            objective=Seq2Seq(label_smoothing=0.1),
            optimizer=OptimizerConfig(
                "adam", 0.3, "noam", warmup_steps=400, b2=0.98, eps=1e-9, weight_decay=0.0, noam_dim=256,
            ),
            plan=PlanConfig(unroll=True),
            training=LoopConfig(
                steps=2000, batch_size=32, sequence_length=LENGTH, log_every=20, eval_every=200, checkpoint_every=100,
                keep_last=5, eval_batches=20,
            ),
        )
    )  # fmt: skip
