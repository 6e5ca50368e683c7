"""What a run is built of is checked before anything is compiled."""

import numpy as np
import pytest
from tiny_models import MODELS

from llm_jax.models import parameters
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig


def test_parameters_that_no_module_reads_do_not_train():
    model = MODELS["gpt2"]
    config = RunConfig(model, plan=PlanConfig(data=8), training=LoopConfig(batch_size=8, sequence_length=8, steps=3))
    given = parameters.declared(model)[0]
    add = lambda params: {**params, "spare": {"kernel": np.zeros((2, 2), np.float32)}}
    with pytest.raises(ValueError, match="no module reads spare/kernel"):
        build(config, Plan(config.plan, model), None, given, add)
    build(config, Plan(config.plan, model), None, given)
