"""What `rehearse --step=prefill|decode` compiles: reading prompts into a cache, or one token for every row.

Weights and cache are in the plan's compute dtype and lie as they compute: divided over `model`, whole along `data`,
where the rows are. `training.batch_size` rows of `training.sequence_length` slots; a prefill fills them all.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from jax.typing import DTypeLike

from llm_jax.decoding import prefill
from llm_jax.nn import weights
from llm_jax.nn.cache import Cache
from llm_jax.nn.protocols import Model, Params, Tree
from llm_jax.nn.stack import unstack
from llm_jax.parallel.plan import Plan
from llm_jax.rehearse.report import Report
from llm_jax.training import flops
from llm_jax.training.precision import DTYPES
from llm_jax.training.run_config import RunConfig


def _bytes_per_device(tree: Tree) -> int:
    """Bytes that a tree takes on one device."""
    shard = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return weights.bytes_of(jax.tree.map(shard, tree))


def lower(config: RunConfig, plan: Plan, step: str) -> tuple[Lowered, Report]:
    """The program, not compiled yet, and its figures that need no compiler.

    Args:
      config: the run; `training.batch_size` rows of `training.sequence_length` slots.
      plan: of the config.
      step: `prefill` or `decode`.

    Raises:
      ValueError: if the model does not generate, or the plan has axes along which nothing is served.
    """
    prefill.check_generates(config.model.make())
    if prefill.is_encoder_decoder(config.model.make()):
        raise ValueError("prefill and decode are rehearsed for decoders; this model reads a source first")
    if plan.config.pipe > 1 or plan.config.seq > 1:
        raise ValueError(f"--step={step} serves along data and model: leave plan.pipe and plan.seq")
    rows, slots = config.training.batch_size, config.training.sequence_length
    plan.check_batch(rows)
    dtype = DTYPES[plan.config.precision]
    model = config.model.make(plan.execution(dtype=dtype))
    params = _parameters(model, plan, dtype)
    cache = _cache(config, plan, dtype)
    width, spread = slots if step == "prefill" else 1, plan.batch_sharding()
    ids, mask = (jax.ShapeDtypeStruct((rows, width), kind, sharding=spread) for kind in (jnp.int32, jnp.bool_))

    def read_on(params: Params, ids: jax.Array, mask: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = prefill.go_on(model, params, ids, mask, cache)
        return jnp.argmax(logits, axis=-1), cache

    lies = jax.tree.map(lambda x: x.sharding, cache)
    lowered = jax.jit(read_on, donate_argnums=3, out_shardings=(spread, lies)).lower(params, ids, mask, cache)
    plain = config.model.make(flops.PLAIN)
    counted = flops.of_forward(lambda p, call: prefill.go_on(plain, p, *call), params, (ids, mask, cache))
    figures = {
        "parameters": weights.count(params),
        "tokens_per_step": rows * width,
        "held": {"parameters": _bytes_per_device(params), "cache": _bytes_per_device(cache)},
        "model_flops": counted.useful(step == "prefill"),
    }
    return lowered, figures


def _placed(x: jax.ShapeDtypeStruct, spec: P, plan: Plan, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An abstract array on the plan's devices, floats in another dtype."""
    kind = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return jax.ShapeDtypeStruct(x.shape, kind, sharding=NamedSharding(plan.mesh, spec))


def _parameters(model: Model, plan: Plan, dtype: DTypeLike) -> Params:
    """Abstract parameters, unstacked, as they compute."""
    boxed = jax.eval_shape(lambda key, ids: model.init(key, ids)["params"], jax.random.key(0), np.zeros((1, 2), int))
    stacked, axes = weights.split_axes(boxed)
    shapes = jax.eval_shape(unstack, stacked)
    return jax.tree.map(lambda x, spec: _placed(x, spec, plan, dtype), shapes, plan.specs(shapes, axes, False))


def _cache(config: RunConfig, plan: Plan, dtype: DTypeLike) -> Cache:
    """An abstract cache: rows divided as the batch's, heads as the keys'."""
    rows, heads = plan.batch_sharding().spec, plan.rules["kv"]
    made = lambda: config.model.init_cache(config.training.batch_size, config.training.sequence_length, dtype)
    place = lambda x: _placed(x, P(*rows, *(heads,) * (x.ndim > 1)), plan, dtype)
    return jax.tree.map(place, jax.eval_shape(made))
