"""Every schedule equals accumulation over the same micro-batches on one device: parameters, moments, losses, norms."""

import jax
import numpy as np
import pytest
from plan_runs import one_device, start, two_steps

from llm_jax.nn import paths
from llm_jax.parallel import pipeline, schedules
from llm_jax.parallel.plan import PlanConfig

ROWS = {  # name: (plan, model); 5 layers are no multiple of 2 or 4, dropout is on in `deep`
    "gpipe, 5 layers in 2": (PlanConfig(data=4, pipe=2, schedule="gpipe"), "deep"),
    "1f1b, 5 layers in 4, zero 1": (PlanConfig(data=2, pipe=4, schedule="1f1b", zero=1), "deep"),
    "interleaved, tied": (PlanConfig(data=4, pipe=2, schedule="interleaved", chunks=2, microbatches=2), "deep_tied"),
    "albert, shared layers, zero 2": (PlanConfig(data=4, pipe=2, schedule="1f1b", zero=2), "albert"),
    "bert, padded rows": (PlanConfig(replica=2, data=2, pipe=2, schedule="zero_bubble", microbatches=2), "bert"),
    "xlnet, two streams": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe"), "xlnet_alone"),
    "t5, two pipelines, zero 3": (PlanConfig(data=4, pipe=2, schedule="gpipe", zero=3), "t5"),
    "transformer, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="gpipe", microbatches=2), "transformer"),
    "zero bubble, zero 3, tensor 2": (PlanConfig(data=2, pipe=2, model=2, schedule="zero_bubble", zero=3), "deep_tied"),
}


@pytest.mark.parametrize("row", ROWS)
def test_equals_accumulation(row):
    config, name = ROWS[row]
    want, want_metrics = one_device(name, config.make_schedule().micros)
    state, metrics = two_steps(config, name, 1)
    got = jax.device_get(state.replace(key=None))
    before = dict(paths.flatten(start(name).params))
    for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)
        if path.startswith("params/") and not path.endswith("key/bias"):
            assert not np.array_equal(b, before[path.removeprefix("params/")]), path
    for a, b in zip(metrics, want_metrics, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "name, p, m, v", [("gpipe", 4, 8, 1), ("1f1b", 4, 8, 1), ("interleaved", 4, 8, 2), ("zero_bubble", 4, 8, 1)]
)
def test_places_of_inputs(name, p, m, v):
    """GPipe holds every micro-batch, the others no more than the pipeline is deep, one more with chunks."""
    s = schedules.make(name, p, m, v)
    held, back = pipeline.slots(s, pipeline.tables(s))
    assert held == {"gpipe": m, "1f1b": p, "interleaved": held, "zero_bubble": p}[name]
    assert back <= held <= m
