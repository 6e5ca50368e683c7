"""Weights: anything that can multiply.

A kernel is a matrix `[in, out]`. A plain array is a weight. So is every `Weight`: a pytree node that replaces an
array in the parameter tree (a low-rank update, a quantized matrix, ...). `nn.Linear` and `nn.Embedding` use only
the functions of this module, so a model runs with any weight unchanged, and weights nest.

Source: this library's own design. The gradient of the plain product is written by hand because autodiff's arrives
in the transposed layout, which XLA:CPU then copies.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax import lax

from llm_jax.nn import paths

Axes = jax.sharding.PartitionSpec  # logical axis names of one leaf; PartitionSpec because it is not a pytree node


class Node(struct.PyTreeNode):
    """Anything structured that may stand in a parameter tree. Subclasses are frozen dataclasses.

    Subclasses register under their qualified name, which is what `structure.json` of a checkpoint holds.
    """

    registry: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the subclass a pytree node and registers it."""
        super().__init_subclass__(**kwargs)
        Node.registry[f"{cls.__module__}.{cls.__qualname__}"] = cls


class Weight(Node):
    """A structured matrix. Subclasses define `dense` and `shape`; all other methods have defaults built on these."""

    def dense(self) -> jax.Array:
        """The matrix as a plain array, `[in, out]`."""
        raise TypeError(f"{type(self).__name__} does not say what its matrix is: define dense()")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the plain matrix would have."""
        raise TypeError(f"{type(self).__name__} does not say its shape: define shape")

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x[..., in] @ self`; `key` feeds dropout inside the weight."""
        del key
        return matmul(x, self.dense())

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`x[..., out] @ self.T`."""
        return matmul_t(x, self.dense())

    def linear(self, x: jax.Array, bias: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
        """`x[..., in] @ self + bias`, as a linear layer computes it; override where the bias is changed too."""
        return add_bias(self.matmul(x, key), bias)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` of the matrix, `[*ids.shape, out]`."""
        return take(self.dense(), ids)

    def ready(self) -> "Weight":
        """The same weight, stacked or not, with what its products derive from it alone computed in advance."""
        return self

    def axes(self, base: Axes) -> "Weight":
        """Logical axes of every leaf, in a node of the same type; `base` are the axes of the plain matrix."""
        return jax.tree.map(lambda leaf: Axes(*base[: leaf.ndim]), self)

    def cast(self, dtype: jnp.dtype) -> "Weight":
        """Floating leaves in `dtype`; override where a leaf must keep its own (quantization scales)."""
        return jax.tree.map(lambda leaf: _cast_leaf(leaf, dtype), self)


class Transposed(Weight):
    """A matrix stored as its transpose `[out, in]`: on a CPU, products with few rows are faster so."""

    transpose: jax.Array

    def dense(self) -> jax.Array:
        """The matrix as a plain array."""
        return self.transpose.T

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `(in, out)` of the matrix, not of its stored transpose."""
        return self.transpose.shape[::-1]

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The product `x[..., in] @ matrix`."""
        del key
        return matmul_t(x, self.transpose)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """The product `x[..., out] @ matrix.T`."""
        return matmul(x, self.transpose)

    def axes(self, base: Axes) -> "Transposed":
        """Logical axes of the stored transpose: the matrix's axes, swapped."""
        return Transposed(Axes(*reversed(base)))  # type: ignore[arg-type]


def is_node(x: Any) -> bool:
    """Whether `x` is a structured entry of a parameter tree."""
    return isinstance(x, Node)


def _cast_leaf(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32; float64 stays float64."""
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def scaled(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    """`x * factor` in the dtype of `x`, multiplied in float32 and rounded once.

    Rounding the factor to bfloat16 first would be an error of up to 0.4 %, the same in every entry.

    Args:
      x: any shape.
      factor: a number, or an array that broadcasts to the shape of `x`.
    """
    x32 = wide(x)
    factor = jnp.asarray(factor, x32.dtype)
    return (x32 * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)


def wide_half(x: jax.Array, wide: bool) -> Any:
    """Float32 if `wide` is set and `x` is float16, whose range ends at 65504; else the dtype of `x`."""
    return jnp.dtype(jnp.float32) if wide and x.dtype == jnp.float16 else x.dtype


# The plain product ---------------------------------------------------------------------------------------


FEW_ROWS = 64
NARROW = 8  # a side this many times as long as the other


def _contract(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    whole = lambda x, w: lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))
    if axis == 1 and 1 < math.prod(x.shape[:-1]) <= FEW_ROWS:
        return lax.platform_dependent(x, w, cpu=_few_rows, default=whole)
    return whole(x, w)


def _few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., in] @ w[out, in].T` as `(w @ x.T).T`.

    XLA:CPU repacks the second operand into tiles before every product. Here that is the few rows of `x` instead of
    all of `w`; the barrier keeps the compiler from swapping the operands back.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = lax.optimization_barrier(lax.dot_general(w, rows, (((1,), (1,)), ((), ()))))
    return y.T.reshape(*x.shape[:-1], w.shape[0])


def _outer(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if b.shape[-1] <= min(FEW_ROWS, a.shape[-1] // NARROW):  # `b.T @ a`: XLA:CPU copies the first operand's transpose
        return _outer(b, a, dtype).T
    lead = tuple(range(a.ndim - 1))  # contract all leading axes: reshaping them would gather sharded sequences
    return lax.dot_general(a, b, ((lead, lead), ((), ()))).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    return _contract(x, w, 1 if transposed else 0)


def _product_fwd(x, w, transposed):
    # of one structure whatever is differentiated: jax keeps that of the first time for a traced product
    nothing = jnp.zeros((0,), x.value.dtype)
    saved = (x.value if w.perturbed else nothing, w.value if x.perturbed else nothing)
    return _contract(x.value, w.value, 1 if transposed else 0), saved


def _product_bwd(transposed, saved, dy):
    x, w = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    # two products read dy; without the barrier a TPU computes dy twice
    dy = lax.optimization_barrier(dy)
    dx = _contract(dy, w, 0 if transposed else 1) if w.size else None
    if not x.size:
        return dx, None
    return dx, _outer(dy, x, dy.dtype) if transposed else _outer(x, dy, dy.dtype)


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _rows(w: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(w, ids, axis=0)


def _rows_fwd(w, ids):
    return _rows(w, ids), (jnp.zeros((w.shape[0], 0), w.dtype), ids)


def _rows_bwd(saved, dy):
    like, ids = saved  # summed over the batch in float32: a bfloat16 sum of ones stops growing at 256
    dy = wide(dy)
    total = jnp.zeros((like.shape[0], dy.shape[-1]), dy.dtype).at[ids].add(dy, mode="drop")
    return total.astype(like.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


def _varying(x: jax.Array) -> frozenset[str]:
    aval = jax.typeof(x)  # jax 0.10 moved `vma` into `manual_axis_type`
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def _same_varying(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`, marks both operands as varying over the union of their manual axes."""
    vx, vw = _varying(x), _varying(w)
    if vx == vw:
        return x, w
    grow = lambda a, have: lax.pcast(a, tuple((vx | vw) - have), to="varying") if (vx | vw) - have else a
    return grow(x, vx), grow(w, vw)


# The protocol --------------------------------------------------------------------------------------------


def matmul(x: jax.Array, w: Any, key: jax.Array | None = None) -> jax.Array:
    """`x[..., in] @ w[in, out]`; `key` feeds dropout inside a structured weight."""
    if isinstance(w, Weight):
        return w.matmul(x, key)
    return _product(*_same_varying(x, w), False)


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`y[..., D] + bias[D]` in the dtype of `y`; the broadcast is written out, our tests forbid implicit ones."""
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def linear(x: jax.Array, w: Any, bias: jax.Array | None, key: jax.Array | None = None) -> jax.Array:
    """`x[..., in] @ w[in, out] + bias[out]`; `key` feeds dropout inside a structured weight."""
    return w.linear(x, bias, key) if isinstance(w, Weight) else add_bias(matmul(x, w), bias)


def matmul_t(x: jax.Array, w: Any) -> jax.Array:
    """`x[..., out] @ w[in, out].T`, the tied head."""
    if isinstance(w, Weight):
        return w.matmul_t(x)
    return _product(*_same_varying(x, w), True)


def take(w: Any, ids: jax.Array) -> jax.Array:
    """Rows of `w`: `[*ids.shape, out]`."""
    return w.take(ids) if isinstance(w, Weight) else _rows(*_same_varying(w, ids))


def dense(w: Any) -> jax.Array:
    """The matrix as a plain array."""
    return w.dense() if isinstance(w, Weight) else w


materialize = jax.jit(dense)  # for use outside jit: one compilation per type and shape instead of one per operation


def cast(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves of a parameter tree; quantization scales keep their dtype. None casts nothing."""
    if dtype is None:
        return tree
    leaf = lambda w: w.cast(dtype) if isinstance(w, Weight) else jax.tree.map(lambda x: _cast_leaf(x, dtype), w)
    return jax.tree.map(leaf, tree, is_leaf=is_node)


def ready(tree: Any) -> Any:
    """A parameter tree whose products compute nothing from parameters alone; see `Weight.ready`."""
    return jax.tree.map(lambda w: w.ready() if isinstance(w, Weight) else w, tree, is_leaf=is_node)


def shape_of(w: Any) -> tuple[int, ...]:
    """Shape of the plain matrix that `w` stands for."""
    return tuple(w.shape)


# every kernel of self-attention, cross-attention and feed-forward layers; no embedding, pooler or head
LAYER_KERNELS = ("*attention/*/kernel", "mlp/*/kernel")


def is_matrix(path: str, w: Any) -> bool:
    """Whether `w` is a matrix, stacked over layers or not; a stacked vector `[L, D]` is not a matrix."""
    return len(shape_of(w)) - paths.is_stacked(path) == 2


def axes_of(w: Any, base: Axes) -> Any:
    """Logical axes of every leaf of `w`, given those of the plain array."""
    return w.axes(base) if isinstance(w, Weight) else base


def count(tree: Any) -> int:
    """Number of stored scalars in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Total bytes of all leaves; works on abstract trees too."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


# Reading and declaring parameters ------------------------------------------------------------------------


class Boxed(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with its logical axes, as `init` returns it. `split_axes` takes the boxes off."""

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The parameter without its box."""
        return self.value

    def replace_boxed(self, val: Any) -> "Boxed":
        """A box of the same axes around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[str, Any]) -> "Boxed":
        """Adds the axis `params["name"]` at `index`."""
        names = list(self.names)
        names.insert(index, params.get("name"))
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: dict[str, Any]) -> "Boxed":
        """Removes the axis at `index`."""
        del params
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


def parameter(
    module: Any,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> Any:
    """Reads parameter `name` of a Linen module, or initialises it (float32, boxed with its logical axes).

    Linen's own `param` compares the stored value with the initialiser's shape and so rejects structured weights; here
    only the shape of the plain matrix is compared.

    Raises:
      ValueError: if the stored weight has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, lambda key: Boxed(init(key, shape, jnp.float32), axes))
    w = module.get_variable("params", name)
    w = w.value if isinstance(w, Boxed) else w
    if shape_of(w) != tuple(shape):
        where = "/".join((*module.path, name))
        raise ValueError(f"{where} has shape {shape_of(w)}, the config asks for {tuple(shape)}")
    return w


def split_axes(boxed: Any) -> tuple[Any, Any]:
    """Splits what `init` returned into (parameters, logical axes of every parameter)."""
    is_box = lambda x: isinstance(x, Boxed)
    params = jax.tree.map(lambda b: b.value if is_box(b) else b, boxed, is_leaf=is_box)
    axes = jax.tree.map(lambda b: Axes(*b.names) if is_box(b) else Axes(*(None,) * jnp.ndim(b)), boxed, is_leaf=is_box)
    return params, axes


def replace(tree: Any, patterns: str | Iterable[str], fn: Callable[[str, Any], Any]) -> Any:
    """Replaces every weight whose path matches by `fn(path, weight)`; structured weights count as one leaf.

    Raises:
      ValueError: if a pattern matches nothing.
    """
    chosen = set(paths.select([p for p, _ in paths.flatten(tree, is_node)], patterns))
    return paths.map_with_path(lambda p, w: fn(p, w) if p in chosen else w, tree, is_leaf=is_node)


# Structure: what a file of arrays cannot express ---------------------------------------------------------------


def structure(tree: Any) -> dict[str, Any]:
    """Describes the structured nodes: `{path: {"type": name, "static": {...}}}`, JSON-ready."""
    out = {}
    for path, node in paths.flatten(tree, is_node):
        if is_node(node):
            out[path] = _describe(node)
    return out


def _describe(node: Node) -> dict[str, Any]:
    static: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, f.name)
        if not f.metadata.get("pytree_node", True):
            static[f.name] = list(value) if isinstance(value, tuple) else value
        elif is_node(value):
            fields[f.name] = _describe(value)
        else:
            fields[f.name] = value is not None
    return {"type": f"{type(node).__module__}.{type(node).__qualname__}", "static": static, "fields": fields}


def build(description: dict[str, Any], leaf: Callable[[str], Any], path: str) -> Node:
    """Rebuilds a node from `structure`'s description; `leaf(path)` supplies the arrays.

    Raises:
      ValueError: if the type is unknown. Only types of this library are imported by name.
    """
    name = description["type"]
    if name not in Node.registry and name.startswith("llm_jax."):
        importlib.import_module(name.rpartition(".")[0])
    if name not in Node.registry:
        raise ValueError(f"{path}: unknown weight type {name!r}; import the module that defines it first")
    static = {k: tuple(v) if isinstance(v, list) else v for k, v in description["static"].items()}
    fields = {}
    for key, value in description["fields"].items():
        here = f"{path}/{key}"
        fields[key] = build(value, leaf, here) if isinstance(value, dict) else (leaf(here) if value else None)
    return Node.registry[name](**fields, **static)
