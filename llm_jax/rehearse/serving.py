"""What `rehearse --step=prefill|decode` compiles: reading prompts into a cache, or one token for every row.

Weights and cache are in the plan's compute dtype and lie as they compute: divided over `model`, whole along `data`,
where the rows are. `training.batch_size` rows of `training.sequence_length` slots; a prefill fills them all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.decoding import prefill
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.parallel.plan import Plan
from llm_jax.training import flops
from llm_jax.training.precision import DTYPES
from llm_jax.training.run_config import RunConfig


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    shard = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return weights.bytes_of(jax.tree.map(shard, tree))


def lower(config: RunConfig, plan: Plan, step: str) -> tuple[Any, dict[str, Any]]:
    """The program, not compiled yet, and what is known of it.

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
    boxed = jax.eval_shape(lambda key, ids: model.init(key, ids)["params"], jax.random.key(0), np.zeros((1, 2), int))
    stacked, axes = weights.split_axes(boxed)
    shapes = jax.eval_shape(unstack, stacked)

    def put(x: Any, spec: P, kind: Any) -> Any:
        kind = kind if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=NamedSharding(plan.mesh, spec))

    params = jax.tree.map(lambda x, s: put(x, s, dtype), shapes, plan.specs(shapes, axes, False))
    spread = plan.batch_sharding().spec
    heads = plan.rules["kv"]
    cache = jax.eval_shape(lambda: config.model.init_cache(rows, slots, dtype))
    cache = jax.tree.map(lambda x: put(x, P(*spread, *(heads,) * (x.ndim > 1)), dtype), cache)
    width = slots if step == "prefill" else 1
    ids = put(jax.ShapeDtypeStruct((rows, width), jnp.int32), spread, None)
    mask = put(jax.ShapeDtypeStruct((rows, width), jnp.bool_), spread, None)

    def go_on(params: Any, ids: Any, mask: Any, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = prefill.go_on(model, params, ids, mask, cache)
        return jnp.argmax(logits, axis=-1), cache

    where = jax.tree.map(lambda x: x.sharding, cache)
    lowered = jax.jit(go_on, donate_argnums=3, out_shardings=(ids.sharding, where)).lower(params, ids, mask, cache)
    plain = config.model.make(flops.PLAIN)
    counted = flops.of_forward(lambda p, call: prefill.go_on(plain, p, *call), params, (ids, mask, cache))
    known = {
        "parameters": weights.count(stacked),
        "tokens_per_step": rows * width,
        "held": {"parameters": _held(params), "cache": _held(cache)},
        "model_flops": counted.useful(step == "prefill"),
    }
    return lowered, known
