"""State in host memory: bitwise what it is on the device, and where it says."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plan_runs import MODELS_HERE, assert_equals_one_device, first_params, program, run_steps, task

from llm_jax.nn import paths
from llm_jax.parallel.memory import offload
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig

ONE = PlanConfig(data=1)


@functools.cache
def run(plan):
    _, made = program(plan, "llama", devices=jax.devices()[:1])
    state = made.init(jax.random.key(3), jax.tree.map(np.copy, first_params("llama")))
    metrics = []
    for batch in task("llama")[1]:
        state, values = made.step(state, batch)
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.mark.parametrize("changes", [
    {"offload": ("optimizer",)}, {"offload": ("update",)}, {"offload": ("update",), "precision": "bf16",
     "master": "in_optimizer"}, {"remat": "offload:block"}, {"offload": ("update", "parameters"), "remat": "full"},
    {"offload": ("update", "parameters"), "remat": "dots", "precision": "bf16", "master": "in_optimizer"},
], ids=["optimizer", "update", "update of a master copy", "activations", "parameters", "parameters and a master copy"],
)  # fmt: skip
def test_bitwise_equal_to_the_resident_run(changes):
    resident = {k: v for k, v in changes.items() if k != "offload"}
    state, metrics = run(dataclasses.replace(ONE, **changes))
    if changes.get("remat") == "offload:block":
        resident = {"remat": "full"}
    want, want_metrics = run(dataclasses.replace(ONE, **resident))
    for (path, a), b in zip(
        paths.flatten(state.replace(key=None)), jax.tree.leaves(want.replace(key=None)), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert metrics == want_metrics
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((state.opt_state, state.master)) if x.ndim}
    assert kinds == {"pinned_host" if "offload" in changes else "device"}
    for path, x in paths.flatten(state.params):
        down = "parameters" in changes.get("offload", ()) and paths.is_stacked(path) and x.ndim == 3
        assert x.sharding.memory_kind == ("pinned_host" if down else "device"), path


@pytest.mark.parametrize("name, axes", [("llama", {"data": 4, "model": 2})])  # others: parity/test_memory_tiers.py
def test_parameters_of_many_devices(name, axes):
    plan = PlanConfig(**axes, zero=3, remat="full", offload=("update", "parameters"))
    assert_equals_one_device(*run_steps(plan, name), name)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"offload": ("parameters",)}, "goes with update"),
        ({"remat": "none"}, "plan.remat=none: set full"),
        ({"unroll": True}, "excludes plan.pipe, plan.explicit and plan.unroll"),
        ({"precision": "bf16"}, "set plan.precision=fp32, or bf16 and plan.master=in_optimizer"),
        ({"precision": "fp16", "master": "in_optimizer"}, "set plan.precision=fp32"),
    ],
)
def test_parameters_refuse(changes, words):
    with pytest.raises(ValueError, match=words):
        PlanConfig(**{"offload": ("update", "parameters"), "remat": "full", **changes})


def test_parameters_of_shared_layers_and_micro_batches():
    plan = dataclasses.replace(ONE, offload=("update", "parameters"), remat="full")
    with pytest.raises(ValueError, match="no place for layers that share"):
        run_steps(plan, "albert", devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="training.accumulation=2 with plan.offload=parameters: set it to 1"):
        program(plan, "llama", 2, devices=jax.devices()[:1])


def test_errors():
    poor = SimpleNamespace(platform="npu", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ValueError, match="plan.offload needs pinned_host memory; npu has device: set plan.offload="):
        offload.check_memory(poor)
    config = RunConfig(MODELS_HERE["llama"], plan=PlanConfig(offload=("update",)), optimizer=OptimizerConfig("muon"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=8, batch_size=8))
    with pytest.raises(ValueError, match="on the host .*, not muon: set plan.offload="):
        build(config, Plan(config.plan, config.model), None)
