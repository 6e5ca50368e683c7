"""ZeRO-3 with its collectives written out: a stack of layers in `shard_map` over the batch.

The compiler's own partitioning gathers a layer's parameters where it needs them and sums gradients as it likes. On TPUs
it likes to all-reduce whole gradients and cut them afterwards, twice the bytes of ZeRO's reduce-scatter, where many of
them form a torus (64 and 256 chips were tried). Scattered along one dimension of the torus after the other, the sums
are true reduce-scatters. So here every layer gathers its parameters itself, and gradients are scattered in stages; the
token table and the output layer do the same.

Sources: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; Thakur et al. 2005 (sums along a torus).
"""

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
from llm_jax.nn.stack import Call
from llm_jax.parallel.pipeline.interpreter import unusable_outputs
from llm_jax.parallel.pipeline.stage import pin
from llm_jax.parallel.rules import size_of

ROWS = ("replica", "data")
Groups = tuple[tuple[int, ...], ...]
Axes = str | tuple[str, ...]  # of the mesh


def stages(mesh: Mesh, axis: str) -> tuple[Groups, ...]:
    """Groups of places along a mesh axis, one stage for each dimension of the torus that its devices span.

    Places that agree in all coordinates but one are a group of that stage; stage after stage, everyone is left with
    its own block. Devices without coordinates, or with such as do not fill a box in order, are one stage of one group.
    """
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    at = np.array([getattr(d, "coords", (i,))[::-1] for i, d in enumerate(line)])  # the slowest first, as in the mesh
    at = at[:, [len(set(column)) > 1 for column in at.T]]
    places = [np.unique(column, return_inverse=True)[1] for column in at.T]
    sizes = [int(p.max()) + 1 for p in places]
    ids = np.arange(len(line))
    if len(sizes) < 2 or math.prod(sizes) != len(line) or (np.ravel_multi_index(tuple(places), sizes) != ids).any():
        return ((tuple(range(len(line))),),)
    box = ids.reshape(sizes)
    cut = lambda k: np.moveaxis(box, k, -1).reshape(-1, sizes[k])
    return tuple(tuple(map(tuple, cut(k).tolist())) for k in range(len(sizes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, dimension: int, scatter: tuple[Groups, ...], axes: Axes = "data") -> jax.Array:
    """The blocks of all devices along mesh axes, side by side in a dimension; its gradient is scattered by stages."""
    del scatter
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)


def _gather_fwd(x, dimension, scatter, axes):
    return gather(x, dimension, scatter, axes), None


def _gather_bwd(dimension, scatter, axes, _, dy):
    for groups in scatter:
        own = None if len(groups) == 1 else groups
        dy = jax.lax.psum_scatter(dy, axes, scatter_dimension=dimension, tiled=True, axis_index_groups=own)
    return (dy,)


gather.defvjp(_gather_fwd, _gather_bwd)


class Gathered(weights.Weight):
    """A matrix that is gathered, where it is divided, for products with what each device has of rows and positions.

    Attributes:
      array: the matrix.
      mesh: the devices.
      spec: mesh axes of the matrix.
      rows: mesh axes of what it is multiplied with, batch first.
      scatter: stages of its gradient.
    """

    array: jax.Array
    mesh: Mesh = struct.field(pytree_node=False)
    spec: P = struct.field(pytree_node=False)
    rows: P = struct.field(pytree_node=False)
    scatter: tuple[Groups, ...] = struct.field(pytree_node=False)

    def dense(self) -> jax.Array:
        """The matrix itself."""
        return self.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole matrix."""
        return self.array.shape

    def _locally(self, fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        sizes = [size_of(self.mesh, axes) for axes in self.rows]
        if x.ndim < len(sizes) or any(n % size for n, size in zip(x.shape, sizes, strict=False)):
            return fn(x, self.array)  # a few chosen positions, or none: the compiler's
        place = next((i for i, axes in enumerate(self.spec) if axes is not None), None)
        inside = jax.sharding.get_abstract_mesh()  # of a pipeline's stage
        on_cpu = not inside.empty and self.mesh.devices.flat[0].platform == "cpu"
        array = weights.wide(self.array) if on_cpu else self.array  # which sums no bfloat16 where not all is manual

        def local(own: jax.Array, x: jax.Array) -> jax.Array:
            whole = own if place is None else gather(own, place, self.scatter, self.spec[place])
            return fn(x, whole.astype(self.array.dtype))

        manual = {axis for axes in self.rows for axis in ((axes,) if isinstance(axes, str) else axes)}
        run = jax.shard_map(
            local,
            mesh=self.mesh if inside.empty else inside,
            in_specs=(self.spec, self.rows),
            out_specs=self.rows,
            axis_names=manual,
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


OUTSIDE = ("embed/embedding", "positions/embedding", "head/kernel")  # matrices outside of stacks that all rows read


def gathering(mesh: Mesh, specs: Any, rows: P = P(ROWS)) -> Callable[[Any], Any]:
    """Puts `Gathered` in the place of the matrices outside of stacks, in parameters that compute.

    Args:
      mesh: the devices.
      specs: mesh axes of every parameter of the model, as stored.
      rows: mesh axes of the batch, and of its positions.
    """
    by_path = dict(paths.flatten(specs, lambda x: isinstance(x, P)))
    divided = [axis for axis in mesh.axis_names if axis in ("data", "seq") and mesh.shape[axis] > 1]
    scatter = stages(mesh, "data") if divided == ["data"] else ((tuple(range(mesh.size)),),)  # one stage of all

    def one(path: str, x: Any) -> Any:
        if path not in OUTSIDE or weights.is_node(x):
            return x
        # other axes are the compiler's
        own = P(*(a if a in ("data", "seq", ("data", "seq")) else None for a in by_path[path]))
        return Gathered(x, mesh, own, rows, scatter)

    return lambda params: paths.map_with_path(one, params, is_leaf=weights.is_node)


def _has_rows(path: Any) -> bool:
    """Whether what layers share at a path may have rows: names say their shapes (`distances_PD` has none)."""
    names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
    suffix = names[-1].rpartition("_")[2] if names else ""
    return not suffix.isupper() or suffix.startswith("B")


def is_turned(path: str) -> bool:
    """Whether layers gather a parameter as its transpose where its columns are divided: plain kernels of a stack."""
    return paths.is_stacked(path) and path.endswith("/kernel")


def gathering_layer(mesh: Mesh, stored: Sequence[P], whole: Sequence[P]) -> Callable[[Any], Any]:
    """Gathers one layer's parameters inside a pipeline's turn: kernels where they multiply, others before.

    Args:
      mesh: the devices.
      stored: mesh axes of the layer's parameters, by leaves.
      whole: the same without ZeRO's division.
    """
    scatter = stages(mesh, "data")
    by_rows = lambda x: Gathered(x, mesh, P("data", None), P(ROWS), scatter)  # other axes are the compiler's

    def one(path: str, x: jax.Array, lies: P, computes: P) -> Any:
        if lies == computes:
            return x
        if not is_turned(f"layers/{path}"):
            return pin(x, computes)
        return by_rows(x) if lies[0] == "data" else weights.Transposed(by_rows(x.T))  # type: ignore[arg-type]

    def gathers(layer: Any) -> Any:
        leaves = zip(paths.flatten(layer), stored, whole, strict=True)
        return jax.tree.unflatten(jax.tree.structure(layer), [one(*item, *specs) for item, *specs in leaves])

    return gathers


def runner(mesh: Mesh, specs: Any, execution: Execution) -> Callable[[Call], tuple[Any, Any]]:
    """A stack runner that divides rows over `replica` and `data` and gathers layer by layer.

    Dropout draws other masks than without: every device its own.

    Args:
      mesh: the devices; other axes stay automatic.
      specs: mesh axes of every parameter of the model, as stored (ZeRO-3).
      execution: how layers run; its `remat` keeps no gathered parameters.
    """
    scatter = stages(mesh, "data")

    def run(call: Call) -> tuple[Any, Any]:
        if call.per_layer is not None or len(set(call.group_of)) != len(call.group_of):
            what = "memories" if call.per_layer is not None else "layers that share parameters"
            raise ValueError(f"plan.explicit has no place for {what}: set plan.explicit=False")
        own = functools.reduce(lambda tree, key: tree[key], call.path, specs)["layers"]
        is_spec = lambda s: isinstance(s, P)
        place = lambda s: s.index("data") if "data" in s[1:] else None  # divided by layers: gathered all at once
        places = jax.tree.map(place, own, is_leaf=is_spec)
        kernels = [is_turned(f"layers/{path}") for path, _ in paths.flatten(call.params)]
        batch = jax.tree.leaves(call.carry)[0].shape[0]
        shared, key = call.context
        by_rows = lambda path, x: P(ROWS) if x.ndim and x.shape[0] == batch and _has_rows(path) else P()
        along = lambda at, x: P() if at is None else P(*[None] * at, "data")
        is_place = lambda x: x is None

        def stack(params: Any, carry: Any, shared: Any, key: Any) -> Any:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(ROWS))
            flat_places = jax.tree.leaves(places, is_leaf=is_place)

            def whole_of(x: jax.Array, at: int | None, kernel: bool) -> Any:
                if at is None:
                    return x
                if kernel and at == x.ndim:  # a few columns are no whole lanes, but they are rows
                    return weights.Transposed(gather(x.T, 0, scatter))
                return gather(x, at - 1, scatter)

            def one(x: Any, item: Any) -> tuple[Any, Any]:
                index, leaves = item
                whole = list(map(whole_of, leaves, flat_places, kernels))
                return call.layer(jax.tree.unflatten(form, whole), index, x, None, (shared, key))[0], None

            leaves, form = jax.tree.flatten(params)
            one = jax.checkpoint(one, policy=execution.remat_policy(), prevent_cse=False)
            return jax.lax.scan(one, carry, (jnp.arange(len(call.group_of)), leaves))[0]

        params_in = jax.tree.map(along, places, call.params, is_leaf=is_place)
        carry_in = jax.tree.map(lambda _: P(ROWS), call.carry)
        shared_in = jax.tree_util.tree_map_with_path(by_rows, shared)
        key_in = jax.tree.map(lambda _: P(), key)
        shard = jax.shard_map(
            stack,
            mesh=mesh,
            in_specs=(params_in, carry_in, shared_in, key_in),
            out_specs=carry_in,
            axis_names={*ROWS},
            check_vma=False,
        )
        return shard(call.params, call.carry, shared, key), unusable_outputs(call)

    return run
