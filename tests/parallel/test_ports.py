"""Nodes in ports train under plans as on one device; they read the stream, a norm and their own parameters."""

import pytest
from plan_runs import assert_equals_one_device, run_steps

from llm_jax.parallel.plan import PlanConfig

PLANS = {
    "ZeRO-3": (PlanConfig(data=4, model=2, zero=3), 2),
    "explicit ZeRO-3": (PlanConfig(data=8, zero=3, explicit=True, remat="full"), 1),
    "pipeline": (PlanConfig(data=2, pipe=2, model=2, zero=2, microbatches=2), 1),
    "sequence": (PlanConfig(data=2, seq=4, zero=2), 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_nodes_in_ports_equal_one_device(name):
    plan, accumulation = PLANS[name]
    assert_equals_one_device(*run_steps(plan, "ports", accumulation), "ports")
