"""The training state: everything that a resumed run needs, as one pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llm_jax.nn import weights
from llm_jax.nn.protocols import Params, Tree
from llm_jax.parallel.memory import offload
from llm_jax.training.precision import LossScale, Precision
from llm_jax.training.trainable import partition


class TrainState(struct.PyTreeNode):
    """State between two steps.

    Attributes:
      step: batches seen, int32 (also those whose update was skipped).
      params: all parameters, in the dtype they are stored in.
      opt_state: optimizer state of the trainable part.
      master: float32 copy of the trainable part, None where the parameters are their own master.
      loss_scale: fp16 only.
      carry: what runs on from batch to batch (memories, LSTM states), one entry a row of the batch; None without.
      key: every random draw of step t comes from `fold_in(key, t)`.
      average: exponential moving average of the trainable part, None without.
      bad_steps: consecutive steps with a non-finite loss or gradient.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    master: Params | None
    loss_scale: LossScale | None
    carry: Tree
    key: jax.Array
    average: Params | None
    bad_steps: jax.Array


def averaged(state: TrainState) -> Params:
    """What a run is measured by and hands on: the moving average where it keeps one, else the parameters.

    The average takes the parameters' dtypes and memory; frozen parameters are as they are.
    """
    if state.average is None:
        return state.params

    def settle(average: jax.Array | None, param: jax.Array) -> jax.Array:
        if average is None:
            return param
        kind = param.sharding.memory_kind
        if average.dtype != param.dtype:
            average = offload.to_device(average).astype(param.dtype)
        if kind is None or average.sharding.memory_kind == kind:
            return average
        return jax.device_put(average, average.sharding.with_memory_kind(kind))

    return jax.tree.map(settle, state.average, state.params, is_leaf=lambda x: x is None)


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: jax.Array,
    precision: Precision = Precision(),
    trainable: tuple[str, ...] | None = None,
    ema: bool = False,
    carry: Tree = None,
) -> TrainState:
    """The state before the first step; pure, so it runs under jit with the plan's shardings."""
    learn = partition(params, trainable)[0]
    if precision.keeps_master or precision.rounds:
        learn = weights.cast(learn, jnp.float32)
    master = learn if precision.keeps_master else None
    params = precision.stored(params)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=tx.init(learn),
        master=master,
        loss_scale=precision.init_scale(),
        carry=carry,
        key=key,
        average=jax.tree.map(lambda x: x.astype(jnp.float32), learn) if ema else None,
        bad_steps=jnp.int32(0),
    )
