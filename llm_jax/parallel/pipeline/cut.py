"""Layers in pieces, and the trees of arrays that stages work on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn.protocols import Params, Tree

Layer = Callable[[Params, jax.Array, Tree, Tree], Tree]  # (params of one layer, its index, carry, context) -> carry


class Cut(NamedTuple):
    """Layers of L in pieces of equal length, padded with layers that do nothing.

    Attributes:
      layers: L.
      pieces: p * v.
    """

    layers: int
    pieces: int

    @property
    def each(self) -> int:
        """Layers a piece, the last ones of the last pieces padding."""
        return -(-self.layers // self.pieces)

    def pieces_of(self, x: jax.Array, devices: int) -> jax.Array:
        """`[L, ...]` as `[p, v, each, ...]`: device d has pieces d, d + p, ..."""
        pad = self.each * self.pieces - self.layers
        x = jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) if pad else x
        return x.reshape(-1, devices, self.each, *x.shape[1:]).swapaxes(0, 1)

    def whole(self, x: jax.Array) -> jax.Array:
        """Undoes `pieces_of`."""
        return x.swapaxes(0, 1).reshape(self.each * self.pieces, *x.shape[3:])[: self.layers]

    def padded(self, layer: Layer) -> Layer:
        """`layer`, which passes on what flows into it where its index is that of padding."""
        if self.layers == self.each * self.pieces:
            return layer

        def run(params: Params, index: jax.Array, x: Tree, context: Tree) -> Tree:
            y = layer(params, index, x, context)
            return jax.tree.map(lambda a, b: jnp.where(index < self.layers, a, b), y, x)

        return run


def is_float(x: Any) -> bool:
    """Whether an array has a gradient."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def divide(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """(floating leaves, function that makes the tree with others instead of them)."""
    leaves, form = jax.tree.flatten(tree)
    chosen = [is_float(x) for x in leaves]

    def join(some: list[Any]) -> Tree:
        new = iter(some)
        return jax.tree.unflatten(form, [next(new) if c else x for c, x in zip(chosen, leaves, strict=True)])

    return [x for c, x in zip(chosen, leaves, strict=True) if c], join


def pick(tree: Tree, *at: Any) -> Tree:
    """Indexes every leaf: `x[at]`."""
    return jax.tree.map(lambda x: x[at], tree)


def put_at(tree: Tree, new: Tree, *at: Any) -> Tree:
    """Replaces `x[at]` in every leaf."""
    return jax.tree.map(lambda x, y: x.at[at].set(y), tree, new)


def zeros(tree: Tree, dtype: Any = None) -> Tree:
    """Zeros in the shapes of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def pin(x: jax.Array, spec: P | None, before: int = 0) -> jax.Array:
    """Divides an array over mesh axes; the spec, if any, is of what follows `before` dimensions."""
    if spec is None:
        return x
    inside = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(inside, P(*[None] * before, *spec)))


def pin_gradient(g: jax.Array, spec: P | None) -> jax.Array:
    """Divides a gradient over the mesh axes of its sum.

    What is not divided over `model` is whole first: the compiler would divide the product over that axis too, and then
    exchange pieces by a permutation, which waits for the devices that are at other turns.
    """
    if spec is None:
        return g
    free = jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1 and "model" not in jax.tree.leaves(tuple(spec))
    return pin(pin(g, P()) if free else g, spec)


def by_rows(tree: Tree) -> Tree:
    """Divides activations by rows, between turns: inside one not all devices would reshard them."""
    return jax.tree.map(lambda x: pin(x, P(("replica", "data"))), tree)


def send(tree: Tree, pairs: list[tuple[int, int]]) -> Tree:
    """Sends every leaf along the pipeline, for each pair from its first device to its second."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipe", pairs), tree)
