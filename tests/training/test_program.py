"""What a run is built of is checked before anything is compiled."""

import jax
import numpy as np
import pytest
from tiny_models import MODELS

from llm_jax.models import parameters
from llm_jax.nn import paths
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.program import build, resident
from llm_jax.training.run_config import RunConfig
from llm_jax.training.state import averaged


def test_parameters_that_no_module_reads_do_not_train():
    model = MODELS["gpt2"]
    config = RunConfig(model, plan=PlanConfig(data=8), training=LoopConfig(batch_size=8, sequence_length=8, steps=3))
    given = parameters.declared(model)[0]
    add = lambda params: {**params, "spare": {"kernel": np.zeros((2, 2), np.float32)}}
    with pytest.raises(ValueError, match="no module reads spare/kernel"):
        build(config, Plan(config.plan, model), None, given, add)
    build(config, Plan(config.plan, model), None, given)


@pytest.mark.parametrize("offload", [("disk",), ("update", "parameters")])
def test_the_average_of_a_run_whose_state_lies_elsewhere(offload, tmp_path):
    """It is measured in the dtypes and the memory of the parameters; what a step would do is done by hand."""
    model = MODELS["llama"]
    plan = PlanConfig(data=1, precision="bf16", master="in_optimizer", offload=offload, remat="full")
    training = LoopConfig(batch_size=2, sequence_length=8, ema=0.5)
    program = build(
        RunConfig(model, plan=plan, training=training), Plan(plan, model, jax.devices()[:1]), None, scratch=tmp_path
    )
    state = program.init(jax.random.key(0), None)
    before = jax.device_get(state.params)
    if program.on_disk is None:
        add = lambda x: jax.device_put(np.asarray(x) + 1, x.sharding)
        state = state.replace(average=jax.tree.map(add, state.average))
    else:
        for name in program.on_disk.arrays:
            if name.startswith("average/"):
                program.on_disk.arrays[name][...] += 1
    got = averaged(resident(state, program.on_disk))
    for (path, a), b, c in zip(paths.flatten(got), *map(jax.tree.leaves, (before, state.params)), strict=True):
        assert a.dtype == b.dtype and a.sharding.memory_kind == c.sharding.memory_kind, path
        np.testing.assert_allclose(np.float32(a), np.float32(b) + 1, rtol=2**-7, err_msg=path)
