import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.averaging import average_checkpoints


def test_mean_of_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5, asynchronous=False)
    with pytest.raises(ValueError, match=f"no checkpoints to average in {tmp_path}"):
        average_checkpoints(checkpoints)
    rng = np.random.default_rng(0)
    trees = [
        {
            "w": rng.normal(size=(3, 2)).astype(np.float32),
            "half": rng.normal(size=4).astype(jnp.bfloat16),
            "ids": np.full(2, i, np.int8),
        }
        for i in range(3)
    ]
    for step, tree in enumerate(trees, 1):
        checkpoints.save(step, {"params": tree, "step": np.int32(step)}, {})
    for steps, chosen in ((None, trees), ([2, 3], trees[1:])):
        got = average_checkpoints(checkpoints, steps)
        mean = lambda key: np.mean([np.float64(t[key]) for t in chosen], axis=0)  # noqa: B023
        np.testing.assert_allclose(got["w"], mean("w"), rtol=1e-6)
        assert got["half"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got["half"], mean("half").astype(jnp.bfloat16))
        np.testing.assert_array_equal(got["ids"], chosen[0]["ids"])
    checkpoints.close()
