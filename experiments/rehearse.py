"""Compiles a run's train step for a TPU pod that is not there: does it fit, what does it move, how fast can it be.

    python -m experiments.rehearse --topology=v5e:16x16 --config=experiments/configs/llama2_7b.py

Needs the libtpu wheel (`pip install .[rehearse]`) and no TPU. The compiler is the real one: what it refuses here, a
pod would refuse.
"""

import os

from llm_jax.parallel import chips

os.environ.update(chips.ENVIRONMENT)  # before anything imports jax

import json
import time

from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/llama2_7b.py", "Experiment file, FILE[:variant].")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Chips: v5e:16x16, v5p:8x8x8, v6e:16x16, v4:4x4x4.")
JSON = flags.DEFINE_string("json", None, "Write the figures here as well.")
HLO = flags.DEFINE_string("hlo", None, "Write the optimized program here.")
POLICIES = flags.DEFINE_bool("policies", False, "Print what a chip keeps by policy of plan.remat; compile nothing.")


def main() -> None:
    """Builds the config, compiles, prints the table."""
    from experiments import rehearsal
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    if POLICIES.value:
        print(rehearsal.policies(config, TOPOLOGY.value))
        return
    begin = time.monotonic()
    report = rehearsal.rehearse(config, TOPOLOGY.value, HLO.value)
    report["seconds"] = round(time.monotonic() - begin, 1)
    if JSON.value:
        with open(JSON.value, "w") as f:
            json.dump(report, f, indent=2)
    print(rehearsal.table(report))


if __name__ == "__main__":
    cli.run(main)
