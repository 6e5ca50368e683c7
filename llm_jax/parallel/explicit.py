"""ZeRO-3 with its collectives written out: a stack of layers in `shard_map` over the batch.

The compiler's own partitioning gathers a layer's parameters where it needs them and sums gradients as it likes. On TPUs
it likes to all-reduce whole gradients and cut them afterwards, twice the bytes of ZeRO's reduce-scatter, where many of
them form a torus (64 and 256 chips were tried). Scattered along one dimension of the torus after the other, the sums
are true reduce-scatters. So here every layer gathers its parameters itself, and gradients are scattered in stages; the
token table and the output layer do the same.

Sources: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; Thakur et al. 2005 (sums along a torus).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Params, Tree
from llm_jax.nn.stack import Call
from llm_jax.parallel.pipeline.cut import pin
from llm_jax.parallel.pipeline.interpreter import unusable_outputs
from llm_jax.parallel.rules import is_spec, size_of

ROWS = ("replica", "data")
Groups = tuple[tuple[int, ...], ...]
Axes = str | tuple[str, ...]  # of the mesh


def stages(mesh: Mesh, axis: str) -> tuple[Groups, ...]:
    """Groups of positions along a mesh axis, one stage for each dimension of the torus that its devices span.

    Positions that agree in all coordinates but one are a group of that stage; after the last stage every device is
    left with its own block. Devices without coordinates, or whose coordinates do not fill a box in order, are one
    stage of one group.
    """
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    # the slowest coordinate first, as in the mesh
    coords = np.array([getattr(d, "coords", (i,))[::-1] for i, d in enumerate(line)])
    spanned = [column for column in coords.T if len(set(column)) > 1]
    positions = [np.unique(column, return_inverse=True)[1] for column in spanned]
    sizes = [int(p.max()) + 1 for p in positions]
    ids = np.arange(len(line))
    fills = math.prod(sizes) == len(line) and (np.ravel_multi_index(tuple(positions), sizes) == ids).all()
    if len(sizes) < 2 or not fills:
        return ((tuple(range(len(line))),),)
    box = ids.reshape(sizes)
    along = lambda k: np.moveaxis(box, k, -1).reshape(-1, sizes[k])
    return tuple(tuple(map(tuple, along(k).tolist())) for k in range(len(sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, dimension: int, scatter: tuple[Groups, ...], axes: Axes = "data") -> jax.Array:
    """The blocks of all devices along mesh axes, side by side in a dimension; its gradient is scattered by stages."""
    del scatter
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)


def _gather_fwd(x, dimension, scatter, axes):
    return gather(x, dimension, scatter, axes), None


def _gather_bwd(dimension, scatter, axes, _, dy):
    for groups in scatter:
        several = None if len(groups) == 1 else groups
        dy = jax.lax.psum_scatter(dy, axes, scatter_dimension=dimension, tiled=True, axis_index_groups=several)
    return (dy,)


gather.defvjp(_gather_fwd, _gather_bwd)


class Gathered(weights.Weight):
    """A matrix that every device gathers to multiply the rows and positions that it has.

    Attributes:
      array: the matrix.
      mesh: the devices.
      spec: mesh axes that the matrix is divided over.
      rows: mesh axes of what it is multiplied with, batch first.
      scatter: stages in which its gradient is scattered.
    """

    array: jax.Array
    mesh: Mesh = struct.field(pytree_node=False)
    spec: P = struct.field(pytree_node=False)
    rows: P = struct.field(pytree_node=False)
    scatter: tuple[Groups, ...] = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """The whole matrix, gathered by the compiler."""
        return self.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole matrix."""
        return self.array.shape

    def _locally(self, fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        sizes = [size_of(self.mesh, axes) for axes in self.rows]
        if x.ndim < len(sizes) or any(n % size for n, size in zip(x.shape, sizes, strict=False)):
            return fn(x, self.array)  # a few chosen positions, or none: the compiler's
        dimension = next((i for i, axes in enumerate(self.spec) if axes is not None), None)
        inside = jax.sharding.get_abstract_mesh()  # of a pipeline's stage
        on_cpu = not inside.empty and self.mesh.devices.flat[0].platform == "cpu"
        array = weights.wide(self.array) if on_cpu else self.array  # which sums no bfloat16 where not all is manual

        def local(block: jax.Array, x: jax.Array) -> jax.Array:
            whole = block if dimension is None else gather(block, dimension, self.scatter, self.spec[dimension])
            return fn(x, whole.astype(self.array.dtype))

        run = jax.shard_map(
            local,
            mesh=self.mesh if inside.empty else inside,
            in_specs=(self.spec, self.rows),
            out_specs=self.rows,
            axis_names={name for axes in self.rows for name in ((axes,) if isinstance(axes, str) else axes)},
            check_vma=False,
        )
        return run(array, x)

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x[B, T, in] @ self`."""
        del key
        return self._locally(weights.matmul, x)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x[B, T, out] @ self.T`."""
        return self._locally(weights.matmul_t, x)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the matrix."""
        if ids.ndim < 2:
            return weights.take(self.array, ids)
        return self._locally(lambda ids, whole: weights.take(whole, ids), ids)


def _is_table(names: P) -> bool:
    """Whether all rows read a matrix, by its logical axes: a table of tokens or positions, or the output layer."""
    return len(names) == 2 and "embed" in names and ("vocab" in names or names[0] is None)


def is_layer_matrix(names: P) -> bool:
    """Whether an array holds one matrix for every layer of a stack, by its logical axes."""
    return len(names) == 3 and names[0] == "layers" and None not in names


def kernels(names: Tree) -> Tree:
    """Which parameters are plain matrices of layers, a bool for every array: layers can gather their transposes.

    Args:
      names: logical axes of every parameter; arrays of structured weights are not plain ones.
    """

    def of(names: Tree) -> Tree:
        return is_layer_matrix(names) if is_spec(names) else jax.tree.map(lambda _: False, names, is_leaf=is_spec)

    return jax.tree.map(of, names, is_leaf=lambda x: is_spec(x) or weights.is_node(x))


def gathering(mesh: Mesh, specs: Tree, names: Tree, rows: P = P(ROWS)) -> Callable[[Params], Params]:
    """Replaces matrices outside of stacks that all rows read by `Gathered` ones, in parameters that compute.

    Args:
      mesh: the devices.
      specs: mesh axes of every parameter of the model, as stored.
      names: logical axes of every parameter.
      rows: mesh axes of the batch, and of its positions.
    """
    divided = [axis for axis in mesh.axis_names if axis in ("data", "seq") and mesh.shape[axis] > 1]
    scatter = stages(mesh, "data") if divided == ["data"] else ((tuple(range(mesh.size)),),)  # one stage of all
    pairs = zip(paths.flatten(specs, is_spec), paths.flatten(names, is_spec), strict=True)
    tables = {path: spec for (path, spec), (_, logical) in pairs if _is_table(logical)}

    def gathered(path: str, x: Any) -> Any:
        if path not in tables or weights.is_node(x):
            return x
        # other axes are the compiler's
        spec = P(*(axis if axis in ("data", "seq", ("data", "seq")) else None for axis in tables[path]))
        return Gathered(x, mesh, spec, rows, scatter)

    return lambda params: paths.map_with_path(gathered, params, is_leaf=weights.is_node)


def gathering_layer(mesh: Mesh, stored: Sequence[P], whole: Sequence[P]) -> Callable[[Params], Params]:
    """Gathers one layer's parameters inside a pipeline's turn: plain kernels where they multiply, others before.

    Args:
      mesh: the devices.
      stored: mesh axes of the layer's parameters, by leaves; among plain arrays only matrices are divided by ZeRO
        (`Plan.staged`).
      whole: the same without ZeRO's division.
    """
    scatter = stages(mesh, "data")
    by_rows = lambda x: Gathered(x, mesh, P("data", None), P(ROWS), scatter)  # other axes are the compiler's

    def gathered(x: Any, specs: list[tuple[P, P]]) -> Any:
        if weights.is_node(x):
            leaves, form = jax.tree.flatten(x)
            pairs = zip(leaves, specs, strict=True)
            return jax.tree.unflatten(
                form, [x if lies == computes else pin(x, computes) for x, (lies, computes) in pairs]
            )
        ((lies, computes),) = specs
        if lies == computes:
            return x
        return by_rows(x) if lies[0] == "data" else weights.Transposed(by_rows(x.T))  # type: ignore[arg-type]

    def gathers(layer: Params) -> Params:
        left = iter(zip(stored, whole, strict=True))
        items, form = jax.tree.flatten(layer, weights.is_node)
        return jax.tree.unflatten(form, [gathered(x, [next(left) for _ in jax.tree.leaves(x)]) for x in items])

    return gathers


def _row_specs(shared: Tree, batch: int) -> Tree:
    """Mesh axes of what layers share: rows are divided where an array leads with them.

    A node names its fields that have none in `without_rows`, whose leading dimension can be the batch's by chance.
    """
    declares = lambda x: hasattr(x, "without_rows")

    def of(x: Tree) -> Tree:
        if not declares(x):
            return P(ROWS) if x.ndim and x.shape[0] == batch else P()
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.metadata.get("pytree_node", True)}
        whole = lambda tree: jax.tree.map(lambda _: P(), tree)
        return x.replace(**{k: whole(v) if k in x.without_rows else _row_specs(v, batch) for k, v in fields.items()})

    return jax.tree.map(of, shared, is_leaf=declares)


def _whole(
    x: jax.Array, dimension: int | None, is_kernel: bool, scatter: tuple[Groups, ...]
) -> jax.Array | weights.Weight:
    """One layer's parameter, gathered along the dimension that ZeRO divides; None where it divides none."""
    if dimension is None:
        return x
    if is_kernel and dimension == x.ndim - 1:  # a few columns are not whole lanes, but they are rows
        return weights.Transposed(gather(x.T, 0, scatter))
    return gather(x, dimension, scatter)


def _check(call: Call) -> None:
    """Raises ValueError for stacks that cannot gather layer by layer."""
    if call.per_layer is not None:
        raise ValueError("plan.explicit has no place for memories: set plan.explicit=False")
    if len(set(call.group_of)) != len(call.group_of):
        raise ValueError("plan.explicit has no place for layers that share parameters: set plan.explicit=False")


def runner(mesh: Mesh, specs: Tree, names: Tree, execution: Execution) -> Callable[[Call], tuple[Tree, Tree]]:
    """A stack runner that divides rows over `replica` and `data` and gathers layer by layer.

    Dropout draws other masks than without: every device its own.

    Args:
      mesh: the devices; other axes stay automatic.
      specs: mesh axes of every parameter of the model, as stored (ZeRO-3).
      names: logical axes of every parameter.
      execution: how layers run; its `remat` keeps no gathered parameters.
    """
    scatter = stages(mesh, "data")

    def run(call: Call) -> tuple[Tree, Tree]:
        _check(call)
        layers_of = lambda tree: functools.reduce(lambda tree, key: tree[key], call.path, tree)["layers"]
        stored = jax.tree.leaves(layers_of(specs), is_leaf=is_spec)
        # divided along the axis of layers: gathered all at once, by the compiler
        dimensions = [spec.index("data") - 1 if "data" in spec[1:] else None for spec in stored]
        are_kernels = jax.tree.leaves(kernels(layers_of(names)))
        shared, key = call.context
        leaves, form = jax.tree.flatten(call.params)

        def scan(leaves: list[jax.Array], carry: Tree, shared: Tree, key: jax.Array | None) -> Tree:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(ROWS))

            def layer(carry: Tree, item: tuple[jax.Array, list[jax.Array]]) -> tuple[Tree, None]:
                index, parts = item
                whole = [_whole(*part, scatter) for part in zip(parts, dimensions, are_kernels, strict=True)]
                return call.layer(jax.tree.unflatten(form, whole), index, carry, None, (shared, key))[0], None

            layer = jax.checkpoint(layer, policy=execution.remat_policy(), prevent_cse=False)
            return jax.lax.scan(layer, carry, (jnp.arange(len(call.group_of)), leaves))[0]

        carry_specs = jax.tree.map(lambda _: P(ROWS), call.carry)
        divided = jax.shard_map(
            scan,
            mesh=mesh,
            in_specs=(
                [P() if d is None else P(*[None] * (d + 1), "data") for d in dimensions],
                carry_specs,
                _row_specs(shared, jax.tree.leaves(call.carry)[0].shape[0]),
                jax.tree.map(lambda _: P(), key),
            ),
            out_specs=carry_specs,
            axis_names={*ROWS},
            check_vma=False,
        )
        return divided(leaves, call.carry, shared, key), unusable_outputs(call)

    return run
