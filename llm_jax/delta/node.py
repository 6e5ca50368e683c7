"""What all deltas of a matrix share: a base that stays as it is, and a few numbers beside it that train.

A delta stands where a kernel stood. It folds into the kernel and its bias (`fold`), and can be taken out of them again
(`unfold`). Deltas nest: an IA3 around a LoRA around an int8 matrix.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.weights import Weight

Bias = jax.Array | None


class DeltaError(ValueError):
    """Deltas that do not go together, or not on this weight; one line."""


class Delta(Weight):
    """A weight around another weight.

    Subclasses have a field `base` and define `fold` and `unfold`; both take leading layer axes.

    Attributes:
      trains: names of the fields that train.
      name: what messages call it.
    """

    base: Any

    trains: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "delta"

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """(kernel, bias) with this delta inside, from those of the base."""
        raise TypeError(f"{type(self).__name__} cannot be merged: define fold()")

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Undoes `fold`."""
        raise TypeError(f"{type(self).__name__} cannot be taken out of a merged matrix: define unfold()")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base matrix."""
        return weights.shape_of(self.base)

    def dense(self) -> jax.Array:
        """The base matrix with the delta folded in."""
        return self.fold(weights.dense(self.base), None)[0]

    def ready(self) -> "Delta":
        """This delta, with its base made ready."""
        return self.replace(base=weights.ready(self.base))

    def cast(self, dtype: DTypeLike) -> "Delta":
        """Casts the base by its own rule, and all floating leaves of the delta."""
        cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        rest = {name: x if x is None else cast(x) for name, x in self.leaves().items()}
        return self.replace(base=weights.cast(self.base, dtype), **rest)

    def leaves(self) -> dict[str, jax.Array | None]:
        """The delta's own arrays by field, without the base."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        own = [f.name for f in fields if f.metadata.get("pytree_node", True) and f.name != "base"]
        return {name: getattr(self, name) for name in own}


def check_matrix(path: str, w: Any, purpose: str) -> None:
    """Refuses a target that is not a matrix; `purpose` ends the message.

    Raises:
      DeltaError: naming the path and the shape.
    """
    if not weights.is_matrix(path, w):
        raise DeltaError(f"{path} has shape {weights.shape_of(w)} and is not a matrix; {purpose}")


def is_delta(x: Any) -> bool:
    """Whether `x` is a delta."""
    return isinstance(x, Delta)


def folded(w: Any, bias: Bias) -> tuple[jax.Array, Bias]:
    """(kernel, bias) as plain arrays, with every delta of `w` folded in, the innermost first."""
    return w.fold(*folded(w.base, bias)) if isinstance(w, Delta) else (weights.dense(w), bias)


def unfolded(w: Any, matrix: jax.Array, bias: Bias) -> tuple[Any, Bias]:
    """(`w` around the base that a merged `matrix` leaves, its bias), the outermost delta first."""
    if not isinstance(w, Delta):
        return matrix, bias
    base, bias = unfolded(w.base, *w.unfold(matrix, bias))
    return w.replace(base=base), bias


_folded = jax.jit(folded)
_unfolded = jax.jit(unfolded)


def stripped(w: Any) -> Any:
    """The weight below all deltas."""
    while isinstance(w, Delta):
        w = w.base
    return w


def layers_of(w: Any) -> list[Delta]:
    """The deltas of a weight, the outermost first."""
    found = []
    while isinstance(w, Delta):
        found.append(w)
        w = w.base
    return found


def of(params: Params) -> dict[str, Delta]:
    """The deltas of a tree by path."""
    return {path: w for path, w in paths.flatten(params, weights.is_node) if is_delta(w)}


def _check_any(params: Params) -> None:
    if not of(params):
        raise DeltaError("there is no LoRA or other delta in these parameters")


def _map_modules(params: Any, fn: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """Applies `fn` to every dict that holds a weight itself."""
    if not isinstance(params, Mapping):
        return params
    inner = {k: _map_modules(v, fn) for k, v in params.items()}
    return fn(inner) if any(is_delta(v) for v in inner.values()) else inner


def merge(params: Params) -> Params:
    """Folds every delta into its kernel and bias, which become plain arrays (quantize again where it was quantized).

    Raises:
      DeltaError: if there is no delta, or one has no place (a bias of a module without).
    """
    _check_any(params)

    def merged(module: Mapping[str, Any]) -> Mapping[str, Any]:
        out = dict(module)
        for name, w in module.items():
            if is_delta(w):
                matrix, bias = _folded(w, module.get("bias") if name == "kernel" else None)
                out[name] = matrix
                if bias is not None and name == "kernel":
                    out["bias"] = bias
        return out

    return _map_modules(params, merged)


def unmerge(merged: Params, params: Params) -> Params:
    """Undoes `merge`: the deltas of `params` around what is left of the merged kernels."""

    def walk(node: Any, plain: Any) -> Any:
        if not isinstance(node, Mapping):
            return plain
        out = {k: walk(v, plain[k]) for k, v in node.items()}
        for name, w in node.items():
            if is_delta(w):
                bias = plain.get("bias") if name == "kernel" else None
                out[name], bias = _unfolded(w, plain[name], bias)
                if bias is not None:
                    out["bias"] = bias
        return out

    return walk(params, merged)


def detach(params: Params) -> Params:
    """The same tree with every delta replaced by the weight below it; no array is copied.

    Raises:
      DeltaError: if there is no delta.
    """
    _check_any(params)
    return jax.tree.map(stripped, params, is_leaf=weights.is_node)
