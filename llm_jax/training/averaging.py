"""Averages of parameters over checkpoints.

Source: Vaswani et al. 2017, section 6.1 (the last five, or twenty, checkpoints averaged).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import paths
from llm_jax.nn.protocols import Params
from llm_jax.storage.checkpoints import Checkpoints


def average_checkpoints(checkpoints: Checkpoints, steps: list[int] | None = None, base: Params | None = None) -> Any:
    """The mean of the parameters of several checkpoints (all stored ones by default), in their own dtype.

    Sums run in float64 on the host, one checkpoint in memory at a time. Integer leaves are taken from the first.

    Args:
      checkpoints: of a run.
      steps: which of them, all by default.
      base: parameters that hold what the checkpoints of a delta run leave out, such as `interop.load` gives.

    Raises:
      ValueError: without any checkpoint.
    """
    steps = checkpoints.steps() if steps is None else steps
    if not steps:
        raise ValueError(f"no checkpoints to average in {checkpoints.folder}")
    rest = None if base is None else dict(paths.flatten(base))
    total: Any = None
    first: Any = None
    for step in steps:
        params, _ = checkpoints.restore_params(step, rest=rest)
        first = params if first is None else first
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda s, x: jnp.asarray(s / len(steps), x.dtype) if floating(x) else x, total, first)
