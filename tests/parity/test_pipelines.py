"""More rows of `tests/parallel/pipeline/test_interpreter.py`: other families, layers that stages do not divide."""

import pytest
from plan_runs import assert_equals_one_device, run_steps

from llm_jax.parallel.plan import PlanConfig

ROWS = {  # name: (plan, model)
    "gpipe, 5 layers in 2": (PlanConfig(data=4, pipe=2, schedule="gpipe"), "deep"),
    "eager 1f1b, 5 layers in 4, zero 2": (PlanConfig(data=2, pipe=4, schedule="eager_1f1b", zero=2), "deep"),
    "albert, shared layers, eager 1f1b, zero 2": (
        PlanConfig(data=4, pipe=2, schedule="eager_1f1b", zero=2),
        "albert",
    ),
    "xlnet, two streams": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe"), "xlnet_alone"),
    "transformer, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe", microbatches=2), "transformer"),
}


@pytest.mark.parametrize("row", ROWS)
def test_equals_accumulation(row):
    config, name = ROWS[row]
    assert_equals_one_device(*run_steps(config, name), name, config.make_schedule().micros)
