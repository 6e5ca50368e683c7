"""State in host memory: bitwise what it is on the device, and where it says."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plan_runs import MODELS_HERE, first_params, program, task

from llm_jax.nn import paths
from llm_jax.parallel import offload
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run import RunConfig

ONE = PlanConfig(data=1)


def run(**changes):
    _, made = program(dataclasses.replace(ONE, **changes), "llama", devices=jax.devices()[:1])
    state = made.init(jax.random.key(3), jax.tree.map(np.copy, first_params("llama")))
    metrics = []
    for batch in task("llama")[1]:
        state, values = made.step(state, batch)
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.parametrize("changes", [
    {"offload": ("optimizer",)}, {"offload": ("update",)}, {"offload": ("update",), "precision": "bf16",
     "master": "in_optimizer"}, {"remat": "offload:block"},
], ids=["optimizer", "update", "update of a master copy", "activations"])  # fmt: skip
def test_bitwise_equal_to_the_resident_run(changes):
    resident = {k: v for k, v in changes.items() if k != "offload"}
    state, metrics = run(**changes)
    want, want_metrics = run(**({"remat": "full"} if "remat" in changes else resident))
    for (path, a), b in zip(
        paths.flatten(state.replace(key=None)), jax.tree.leaves(want.replace(key=None)), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert metrics == want_metrics
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((state.opt_state, state.master)) if x.ndim}
    assert kinds == {"pinned_host" if "offload" in changes else "device"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}


def test_errors():
    poor = SimpleNamespace(platform="npu", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ValueError, match="plan.offload needs pinned_host memory; npu has device: set plan.offload="):
        offload.check_memory(poor)
    config = RunConfig(MODELS_HERE["llama"], plan=PlanConfig(offload=("update",)), optimizer=OptimizerConfig("muon"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=8, batch_size=8))
    with pytest.raises(ValueError, match="on the host .*, not muon: set plan.offload="):
        build(config, Plan(config.plan, config.model), None)
