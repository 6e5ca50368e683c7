"""The equality matrix: every model under every plan equals one device; what cannot be is refused with a reason.

`python tests/parity/test_matrix.py` prints the table of WORKSPACE.md, which a test compares.
"""

import pathlib
import sys

import jax
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from plan_runs import assert_equals_one_device, run_steps

from llm_jax.parallel.plan import PlanConfig

MODELS = ("gpt", "llama", "bert", "albert", "t5", "xlnet", "transformer", "lora", "deltas")
PLANS = {  # name: (plan, accumulation)
    "data 8": (PlanConfig(data=8), 1),
    "zero 1": (PlanConfig(data=8, zero=1), 1),
    "zero 2": (PlanConfig(data=8, zero=2), 1),
    "zero 3": (PlanConfig(data=8, zero=3), 1),
    "replicas, zero 2": (PlanConfig(replica=2, data=4, zero=2), 1),
    "tensor 4": (PlanConfig(data=2, model=4), 1),
    "tensor 2, zero 3": (PlanConfig(data=4, model=2, zero=3), 1),
    "sequence 4": (PlanConfig(data=2, seq=4), 1),
    "sequence 2, tensor 2, zero 3": (PlanConfig(data=2, seq=2, model=2, zero=3), 1),
    "accumulation, zero 2": (PlanConfig(data=8, zero=2), 2),
    "remat full, zero 3": (PlanConfig(data=8, zero=3, remat="full"), 1),
    "remat dots, unrolled": (PlanConfig(data=8, remat="dots", unroll=True), 1),
    "optimizer on the host, zero 1": (PlanConfig(data=8, zero=1, offload=("optimizer",)), 1),
    "update on the host, zero 2": (PlanConfig(data=8, zero=2, offload=("update",)), 1),
    "activations on the host": (PlanConfig(data=8, remat="offload:block"), 1),
    "explicit zero 3": (PlanConfig(data=8, zero=3, explicit=True, remat="full"), 1),
    "gpipe 2": (PlanConfig(data=4, pipe=2, schedule="gpipe", microbatches=2), 1),
    "gpipe 2, tensor 2, zero 3": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe", microbatches=2, zero=3), 1),
    "1f1b 2, zero 2": (PlanConfig(data=4, pipe=2, schedule="1f1b", microbatches=2, zero=2), 1),
    "eager 1f1b 2, zero 3": (PlanConfig(data=4, pipe=2, schedule="eager_1f1b", microbatches=4, zero=3), 1),
    "interleaved 2": (PlanConfig(data=4, pipe=2, schedule="interleaved", chunks=2, microbatches=2), 1),
    "zero bubble 2, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="zero_bubble", microbatches=2), 1),
}
DEEPER = {"gpt": "deep_even", "llama": "deep_tied", "xlnet": "xlnet_alone"}  # in a pipeline: more layers, no memory
STILL = {"gpt": "still"}  # explicit ZeRO draws other dropout
EXACT = [("llama", "zero 3"), ("gpt", "tensor 4"), ("llama", "sequence 4"), ("llama", "sequence 2, tensor 2, zero 3")]

SHARED = (
    "tensor 2, zero 3",
    "sequence 2, tensor 2, zero 3",
    "explicit zero 3",
    "1f1b 2, zero 2",
    "update on the host, zero 2",
)


def impossible(model, plan):
    """Words of the error that refuses a cell; None where it runs."""
    config = PLANS[plan][0]
    if config.pipe > 1 and config.schedule != "gpipe" and model in ("t5", "transformer"):
        return "needs one stack of layers, the model has 2"
    if config.explicit and model in ("albert", "xlnet"):
        return "plan.explicit has no place for"
    return None


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Cells compile as in `make test`: what is equal is the partition, not the compiler's optimizations."""


CELLS = [(model, plan) for model in MODELS for plan in PLANS]


@pytest.mark.parametrize("model, plan", CELLS)
def test_equals_one_device(model, plan):
    config, accumulation = PLANS[plan]
    name = DEEPER.get(model, model) if config.pipe > 1 else STILL.get(model, model) if config.explicit else model
    if words := impossible(model, plan):
        with pytest.raises(ValueError, match=words):
            run_steps(config, name, accumulation)
        return
    micros = config.make_schedule().micros if config.pipe > 1 else accumulation
    assert_equals_one_device(*run_steps(config, name, accumulation), name, micros)


@pytest.mark.parametrize("plan", SHARED)
def test_shared_parameters_equal_one_device(plan):
    """Of a model whose keys are its queries (`RunConfig.ties`)."""
    config, accumulation = PLANS[plan]
    assert_equals_one_device(*run_steps(config, "shared", accumulation), "shared")


@pytest.mark.parametrize("model, plan", EXACT)
def test_equals_one_device_in_float64(model, plan):
    with jax.enable_x64(True):
        config, accumulation = PLANS[plan]
        run = run_steps(config, model, accumulation, dtype="float64")
        assert_equals_one_device(*run, model, accumulation, dtype="float64")


def mark(model, plan):
    """How a cell is shown."""
    return "no" if impossible(model, plan) else "= 64" if (model, plan) in EXACT else "="


def table():
    """Markdown: models across, plans down."""
    lines = [f"| plan | {' | '.join(MODELS)} |", f"| --- |{' --- |' * len(MODELS)}"]
    for plan in PLANS:
        lines.append(f"| {plan} | {' | '.join(mark(model, plan) for model in MODELS)} |")
    return "\n".join(lines)


def test_workspace_shows_the_table():
    workspace = pathlib.Path(__file__).resolve().parents[2] / "WORKSPACE.md"
    assert table() in workspace.read_text(), "paste what `python tests/parity/test_matrix.py` prints"


if __name__ == "__main__":
    print(table())
