"""What merging changed: a merged model beside the one with deltas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize

_ROWS, _LENGTH = 2, 16


@functools.partial(jax.jit, static_argnums=0)
def _outputs(model: Model, params: Params, ids_BT: jax.Array) -> jax.Array:
    out = model.apply({"params": realize(params)}, ids_BT)
    return (out.last_hidden_state if out.logits is None else out.logits).astype(jnp.float32)


def merged_difference(model: Model, params: Params, merged: Params) -> float:
    """Largest difference between the logits of a model with deltas and after they are merged.

    Both read the same two rows of random tokens. In float32 the difference is rounding, of the order of 1e-5; much more
    means that a delta was lost, as it may be where a quantized kernel is rounded again.

    Args:
      model: the module.
      params: parameters with deltas.
      merged: the same with the deltas folded in.

    Returns:
      The difference, absolute; of last hidden states where the model has no head.
    """
    length = min(_LENGTH, getattr(model.config, "context_length", _LENGTH))
    ids_BT = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (_ROWS, length)), jnp.int32)
    return float(jnp.max(jnp.abs(_outputs(model, params, ids_BT) - _outputs(model, merged, ids_BT))))
