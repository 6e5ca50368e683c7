"""ZeRO: which of parameters, gradients and optimizer state are divided over the data axis (and that of the sequence).

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. Stage 1 divides the optimizer state, 2 the
gradients too, 3 the parameters too. All three are the same sharding, chosen here; the compiler inserts the
reduce-scatters and all-gathers.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths
from llm_jax.nn.protocols import Params, Tree
from llm_jax.parallel.rules import is_spec, size_of

Axes = str | tuple[str, ...]  # of the mesh


TILE = 16  # rows of a tile of a TPU's memory, in half precision


def divide(
    spec: P, shape: tuple[int, ...], mesh: Mesh, axis: Axes, avoid: tuple[int, ...] = (), turned: bool = False
) -> P:
    """Adds `axis` at the largest free dimension that divides; unchanged where none does.

    The last dimension is taken only if no other divides, because it lies along a vector unit's lanes: gathered in
    slices of a few lanes (11,008 / 256 = 43), a matrix has to be copied into its layout before every product. `avoid`
    lists dimensions taken after that one (the layer axis, along which the scan slices). A layer that gathers a matrix
    itself can gather its transpose (`turned`), so that columns are rows; then blocks of whole tiles come first, since
    others (43 rows) are padded and copied too.
    """
    size = size_of(mesh, axis)
    parts = [*spec, *(None,) * (len(shape) - len(spec))]
    free = [i for i, (n, s) in enumerate(zip(shape, parts, strict=True)) if s is None and n % size == 0 and n > 0]
    if size == 1 or not free:
        return P(*parts)
    tiled = lambda i: turned and shape[i] // size % TILE == 0
    best = max(free, key=lambda i: (i not in avoid, tiled(i), i < len(shape) - 1, shape[i], -i))
    parts[best] = axis
    return P(*parts)


def divide_tree(specs: Tree, params: Params, names: Tree, mesh: Mesh, axis: Axes, turned: Tree = None) -> Tree:
    """`divide` for every parameter.

    Args:
      specs: mesh axes of every parameter.
      params: abstract parameters.
      names: their logical axes.
      mesh: the devices.
      axis: mesh axes to divide over.
      turned: which of them layers can gather as transposes, a bool each; None for none.
    """
    leaves, form = jax.tree.flatten(params)
    columns = [jax.tree.leaves(specs, is_leaf=is_spec), leaves, jax.tree.leaves(names, is_leaf=is_spec)]
    turnable = [False] * len(leaves) if turned is None else jax.tree.leaves(turned)
    divided = []
    for spec, x, logical, can_turn in zip(*columns, turnable, strict=True):
        layer_axes = tuple(i for i, name in enumerate(logical) if name == "layers")
        divided.append(divide(spec, x.shape, mesh, axis, layer_axes, can_turn))
    return jax.tree.unflatten(form, divided)


def state_specs(state: Tree, by_path: Mapping[str, tuple[tuple[int, ...], P]], mesh: Mesh, axis: Axes | None) -> Tree:
    """Mesh axes for optimizer state, averages and masters.

    A leaf whose path ends like a parameter's and has its shape takes the parameter's spec; any other leaf is divided
    along its largest free dimension, or replicated where `axis` is None.

    Args:
      state: abstract tree.
      by_path: `{parameter path: (shape, spec)}`.
      mesh: devices.
      axis: mesh axis to divide over.
    """

    def spec_of(path: str, leaf: Any) -> P:
        parts = path.split("/")
        for i in range(len(parts)):
            hit = by_path.get("/".join(parts[i:]))
            if hit is not None and hit[0] == tuple(leaf.shape):
                return hit[1]
        return P() if axis is None else divide(P(), leaf.shape, mesh, axis)

    return paths.map_with_path(spec_of, state)
