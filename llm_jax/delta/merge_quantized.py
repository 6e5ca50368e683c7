"""Merging into weights as they are stored: int8 stays int8, and an update that rounding swallows is refused.

The values of an int8 matrix lie on a grid, so an update smaller than half a step of its channel vanishes whole: the
merged model would be the base, and nothing would say so. Here the share of every update that survives is measured.

    share = <merged - base, update> / <update, update>            1 where nothing was lost, 0 where it vanished

Source: this library's own check. peft merges and rounds, whatever is left (its issues 2105 and 2368).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.compress.quantize import Quantized, quantize_array
from llm_jax.delta import node
from llm_jax.delta.node import Delta, DeltaError
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params


@jax.jit
def _stored(w: Delta, merged: jax.Array) -> tuple[Any, jax.Array]:
    """(`merged` as the base of `w` is stored, the share of the update that survives, one number a layer)."""
    inside, base = weights.cast(w, jnp.float32), node.stripped(w)
    old = weights.dense(node.stripped(inside))
    no_bias = jnp.zeros((*merged.shape[:-2], merged.shape[-1]))
    update = node.folded(inside, no_bias)[0] - old
    stored = merged
    if isinstance(base, Quantized):
        stored = quantize_array(old + update, -2 if base.scale.shape[-2] == 1 else -1)
    over = lambda x: jnp.sum(x, axis=(-2, -1))
    left, whole = over((weights.wide(weights.dense(stored)) - old) * update), over(jnp.square(update))
    return stored, jnp.where(whole == 0, 1.0, left / jnp.where(whole == 0, 1.0, whole))


def merge(params: Params, least: float = 0.5) -> Params:
    """Folds every delta into its weight, stored as its base was: int8 where that is int8, in its dtype elsewhere.

    Each entry of a merged int8 matrix is at most half a step of its channel from the exact sum.

    Args:
      params: stacked or unstacked.
      least: share of every update that must survive rounding, in each layer; 0 refuses only what vanishes.

    Raises:
      DeltaError: as `node.merge`, for a share outside [0, 1], or naming a weight whose update does not survive.
    """
    if not 0 <= least <= 1:
        raise DeltaError(f"least={least} must lie in [0, 1]")
    deltas, shares = node.of(params), {}

    def stored(path: str, matrix: Any) -> Any:
        if path not in deltas:
            return matrix
        matrix, shares[path] = _stored(deltas[path], matrix)
        return matrix

    merged = paths.map_with_path(stored, node.merge(params), is_leaf=weights.is_node)
    for path, share in jax.device_get(shares).items():
        worst = np.atleast_1d(share).argmin()
        if (value := np.atleast_1d(share)[worst]) < least or value <= 0:
            layer = f", layer {worst}" if np.ndim(share) else ""
            raise DeltaError(
                f"merging into {_kind(deltas[path])} keeps {max(value, 0):.1%} of the update of {path}{layer}, and "
                f"{least:.0%} are asked for: serve the delta unmerged, or merge into floats (node.merge)"
            )
    return merged


def _kind(w: Delta) -> str:
    base = node.stripped(w)
    return "int8" if isinstance(base, Quantized) else str(base.dtype)
