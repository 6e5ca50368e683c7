"""Trains a language model from a config.

    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/demo
    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/x --config.model.num_layers=4
    python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/v --vectors=glove.6B.50d.txt

The same command resumes an interrupted run.
"""

import json
import logging
from typing import Any

from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/demo.py", "Experiment file, FILE[:variant].")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Everything the run writes; may be remote (gs://...).")
RESTORE = flags.DEFINE_integer("restore_step", None, "Resume from this checkpoint instead of the newest.")
ACCEPT = cli.define_accept_changed_data()
log = logging.getLogger(__name__ if __name__ != "__main__" else "experiments.train")
VECTORS = flags.DEFINE_string(
    "vectors", None, "Word vectors that the token table begins with (interop/word_vectors/token_table.py)."
)
SAMPLES = flags.DEFINE_integer("samples", 3, "Continuations printed at the end.", lower_bound=0)


def start(config: Any) -> dict[str, Any]:
    """What `run.train` starts from where there are --vectors."""
    if VECTORS.value is None:
        return {}
    from llm_jax.tasks import vector_start

    given = vector_start.start(config, WORKDIR.value, VECTORS.value)
    print(given.says)
    return {"params": given.params, "tokenizer": given.tokenizer, "extra": {"vectors": VECTORS.value}}


def main() -> None:
    """Builds the config, trains, prints the summary and samples."""
    from llm_jax.tasks import report
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    log.info("config %s", json.dumps(config.to_dict()))
    resumed: dict[str, Any] = {"restore_step": RESTORE.value, "accept_changed_data": ACCEPT.value}
    trained = run.train(config, WORKDIR.value, **resumed, **start(config))
    print(report.summary(config, trained, WORKDIR.value))
    for text in report.samples(trained, SAMPLES.value, config):
        print("-" * 80, text, sep="\n")


if __name__ == "__main__":
    cli.run(main)
