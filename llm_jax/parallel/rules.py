"""From logical axis names to mesh axes, with checks and reasons."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths
from llm_jax.nn.protocols import Tree
from llm_jax.nn.weights import is_node

Rules = Mapping[str, str | tuple[str, ...] | None]

TENSOR_PARALLEL: Rules = {
    "batch": ("replica", "data"),
    "length": "seq",
    "sequence": ("seq", "model"),  # of the residual stream, between the pairs of divided products
    "vocab": "model",
    "heads": "model",
    "kv": "model",
    "mlp": "model",
    "embed": None,
    "norm": None,
    "labels": None,
    "layers": "pipe",
}


class Placed(NamedTuple):
    """Mesh axes of one array.

    Attributes:
      spec: mesh axes.
      why: reasons for logical axes that stay replicated although a rule names a mesh axis.
    """

    spec: P
    why: str


def is_spec(x: Any) -> bool:
    """Whether `x` is a leaf of a tree of axes, logical or of the mesh."""
    return isinstance(x, P)


def without(rules: Rules, manual: Collection[str]) -> Rules:
    """Rules for the inside of a `shard_map` over some axes, which are divided already."""

    def rest(target: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if target is None or isinstance(target, str):
            return None if target in manual else target
        return tuple(a for a in target if a not in manual) or None

    return {name: rest(target) for name, target in rules.items()}


def size_of(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    """Devices along one or several mesh axes."""
    total = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
        total *= mesh.shape[axis]
    return total


def place(names: P, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> Placed:
    """Maps the logical axes of one array; a dimension that does not divide stays replicated, with the reason.

    Of several mesh axes those in front are taken that divide it together.

    Raises:
      ValueError: on an unknown logical name, or a mesh axis used twice in one array.
    """
    out: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    why = []
    for size, name in zip(shape, (*names, *(None,) * (len(shape) - len(names))), strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"no rule for the logical axis {name!r}; rules name {', '.join(rules)}")
        target = None if name is None else rules[name]
        if target is None or size_of(mesh, target) == 1:
            out.append(None)
            continue
        if size % size_of(mesh, target):
            why.append(f"{name}: {size} does not divide by {target}={size_of(mesh, target)}")
        while size % size_of(mesh, target) and not isinstance(target, str) and len(target) > 1:
            target = target[:-1]
        if size % size_of(mesh, target) or size_of(mesh, target) == 1:
            out.append(None)
            continue
        flat = {target} if isinstance(target, str) else set(target)
        if flat & used:
            raise ValueError(f"mesh axis {sorted(flat & used)} is used twice in {names}")
        used |= flat
        out.append(target)
    return Placed(P(*out), "; ".join(why))


def logical_axes(params: Tree, axes: Tree) -> Tree:
    """Logical axes for every leaf of `params`, which may be unstacked or hold structured weights and port nodes.

    Args:
      params: parameter tree (abstract will do).
      axes: what `weights.split_axes` returned for the plain, stacked tree.
    """
    if is_node(params):
        return params.axes(axes)
    if not isinstance(params, Mapping):
        return P(*(None,) * len(params.shape)) if axes is None else axes
    out = {}
    for key, value in params.items():
        if key.isdigit() and isinstance(axes, Mapping) and key not in axes:
            below = jax.tree.map(lambda a: P(*a[1:]), axes, is_leaf=is_spec)
        else:
            below = axes.get(key) if isinstance(axes, Mapping) else None
        out[key] = logical_axes(value, below)
    return out


def table(specs: Tree) -> str:
    """A printable table `path  spec` of a tree of specs."""
    flat = paths.flatten(specs, is_spec)
    width = max(len(p) for p, _ in flat)
    return "\n".join(f"{p:<{width}}  {tuple(s)}" for p, s in flat)
