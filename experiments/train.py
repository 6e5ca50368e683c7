"""Trains a language model from a config.

    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/demo
    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/x --config.model.num_layers=4

The same command resumes an interrupted run.
"""

import json
import logging

from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/demo.py", "Experiment file, FILE[:variant].")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Everything the run writes; may be remote (gs://...).")
RESTORE = flags.DEFINE_integer("restore_step", None, "Resume from this checkpoint instead of the newest.")
log = logging.getLogger(__name__ if __name__ != "__main__" else "experiments.train")
SAMPLES = flags.DEFINE_integer("samples", 3, "Continuations printed at the end.", lower_bound=0)


def main() -> None:
    """Builds the config, trains, prints the summary and samples."""
    from experiments import report
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    log.info("config %s", json.dumps(config.to_dict()))
    trained = run.train(config, WORKDIR.value, restore_step=RESTORE.value)
    print(report.summary(config, trained, WORKDIR.value))
    for text in report.samples(trained, SAMPLES.value, config):
        print("-" * 80, text, sep="\n")


if __name__ == "__main__":
    cli.run(main)
