"""What a forward pass keeps for its backward pass: traced, not run."""

from collections.abc import Mapping

import jax
from jax.extend.core import Literal

from llm_jax.nn import weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Batch, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.ties import expand, parse
from llm_jax.objectives.objective import Objective, total_loss
from llm_jax.training.precision import Precision
from llm_jax.training.run_config import RunConfig

POLICIES = ("none", "dots", "names:attention,mlp", "offload:block", "full")


def residual_bytes(
    config: RunConfig,
    objective: Objective,
    params: Params,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    execution: Execution,
) -> dict[str, int]:
    """Bytes that one micro-batch keeps for the backward pass, by memory: `device`, `host`.

    Arrays that are there anyway (parameters, the batch) do not count; half-precision copies of parameters do.

    Args:
      config: the run.
      objective: as it trains.
      params: abstract parameters.
      batch: abstract batch.
      execution: how the model runs; its `remat` is what this is about.
    """
    model, precision = config.model.make(execution), Precision(config.plan.precision, config.plan.master)

    def residuals(params: Params, batch: Batch) -> list[jax.Array]:
        prepared = objective.prepare(batch, jax.random.key(0))
        inputs, rngs = dict(prepared.inputs), {"dropout": jax.random.key(0)}
        rows = jax.tree.leaves(batch)[0].shape[0]
        if config.objective.carry:
            inputs["cache"] = config.model.init_carry(rows)

        def loss(params: Params) -> jax.Array:
            computing = expand(precision.cast(realize(params)), parse(config.ties))
            out = model.apply({"params": computing}, **inputs, train=True, rngs=rngs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    traced = jax.make_jaxpr(residuals)(params, batch).jaxpr
    there = {id(v) for v in (*traced.invars, *traced.constvars)}
    found = {id(v): v.aval for v in traced.outvars if not isinstance(v, Literal) and id(v) not in there}
    sums = {"device": 0, "host": 0}
    for aval in found.values():
        if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            sums["host" if aval.memory_space == jax.memory.Space.Host else "device"] += weights.bytes_of(aval)
    return sums
