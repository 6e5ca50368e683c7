"""Choosing what trains: a partition of the parameter tree by path.

Gradients are always taken with respect to the trainable part; the frozen part costs no gradient and no optimizer
state, and may hold integers.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.nn import paths


def partition(params: Any, patterns: str | Iterable[str] | None) -> tuple[Any, Any]:
    """Splits into (trainable, frozen), None standing for the leaves of the other part.

    Args:
      params: parameter tree.
      patterns: what trains; None means everything.

    Raises:
      ValueError: if a pattern matches nothing.
      TypeError: if an integer leaf would train (full tuning of a quantized weight).
    """
    names = [p for p, _ in paths.flatten(params)]
    chosen = set(names) if patterns is None else set(paths.select(names, patterns))

    def pick(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return None
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{path} holds {leaf.dtype} and cannot train; choose what trains (training.trainable) or dequantize"
            )
        return leaf

    trainable = paths.map_with_path(pick, params)
    return trainable, paths.map_with_path(lambda p, leaf: None if p in chosen else leaf, params)


def combine(trainable: Any, frozen: Any) -> Any:
    """Undoes `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)
