r"""Compiles a run's train step, or one of serving, for a TPU pod that is not there: does it fit, how fast can it be.

    python -m experiments.rehearse --topology=v5e:16x16 --config=experiments/configs/llama2_7b.py
    python -m experiments.rehearse --topology=v5e:2x4 --config=experiments/configs/llama2_7b.py --step=decode \
        --config.plan.model=8 --config.training.batch_size=64

Needs the libtpu wheel (`pip install .[rehearse]`) and no TPU. The compiler is the real one: what it refuses here, a
pod would refuse.
"""

import os

from llm_jax.parallel import chips

os.environ.update(chips.ENVIRONMENT)  # before anything imports jax

import json
import signal
import sys
import time

from absl import flags

from experiments import cli

CONFIG = cli.define_config("experiments/configs/llama2_7b.py", "Experiment file, FILE[:variant].")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Chips: v5e:16x16, v5p:8x8x8, v6e:16x16, v4:4x4x4.")
JSON = flags.DEFINE_string("json", None, "Write the figures here as well.")
STEP = flags.DEFINE_enum("step", "train", ["train", "prefill", "decode"], "What is compiled; the last two serve.")
HLO = flags.DEFINE_string("hlo", None, "Write the optimized program here.")
POLICIES = flags.DEFINE_bool("policies", False, "Print what a chip keeps by policy of plan.remat; compile nothing.")


def main() -> None:
    """Builds the config, compiles, prints the table."""
    from llm_jax.rehearse import measure
    from llm_jax.rehearse import report as text
    from llm_jax.training import run

    config = cli.from_config_dict(run.RunConfig, CONFIG.value)
    if POLICIES.value:
        print(text.policies(measure.policies(config, chips.describe(TOPOLOGY.value).devices)))
        return
    begin = time.monotonic()
    report = measure.rehearse(config, TOPOLOGY.value, STEP.value, HLO.value)
    report["seconds"] = round(time.monotonic() - begin, 1)
    if JSON.value:
        with open(JSON.value, "w") as f:
            json.dump(report, f, indent=2)
    print(text.table(report))


def apart() -> None:
    """Continues in a child, so that a compiler that takes all memory, and is killed for it, ends in a line."""
    child = os.fork()
    if not child:
        return
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        code = 130
    if code < 0:
        why = signal.Signals(-code).name
        print(
            f"error: the compiler was killed ({why}); after SIGKILL this machine has too little memory for it: free "
            "some, or rehearse fewer chips or a model of fewer layers",
            file=sys.stderr,
        )
    sys.stdout.flush()
    os._exit(code if code >= 0 else 1)


if __name__ == "__main__":
    apart()
    cli.run(main)
