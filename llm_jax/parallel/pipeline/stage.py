"""The layers that one device of a pipeline has, and what a tick does with them.

All that a stage keeps from one tick for another lies in buffers that the ticks' loop carries, `[chunks, places, layers
a piece, ...]`, and is written in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any


class Cut(NamedTuple):
    """Layers of L in pieces of equal length, padded with layers that do nothing.

    Attributes:
      layers: L.
      pieces: p * v.
      each: layers a piece, the last ones of the last pieces padding.
    """

    layers: int
    pieces: int

    @property
    def each(self) -> int:
        """Layers a piece."""
        return -(-self.layers // self.pieces)

    def pieces_of(self, x: jax.Array, devices: int) -> jax.Array:
        """`[L, ...]` as `[p, v, each, ...]`: device d has pieces d, d + p, ..."""
        pad = self.each * self.pieces - self.layers
        x = jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) if pad else x
        return x.reshape(-1, devices, self.each, *x.shape[1:]).swapaxes(0, 1)

    def whole(self, x: jax.Array) -> jax.Array:
        """Undoes `pieces_of`."""
        return x.swapaxes(0, 1).reshape(self.each * self.pieces, *x.shape[3:])[: self.layers]


def is_float(x: Any) -> bool:
    """Whether it has a gradient."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def divide(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """(floating leaves, function that puts others in their places)."""
    leaves, form = jax.tree.flatten(tree)
    chosen = [is_float(x) for x in leaves]

    def join(some: list[Any]) -> Tree:
        new = iter(some)
        return jax.tree.unflatten(form, [next(new) if c else x for c, x in zip(chosen, leaves, strict=True)])

    return [x for c, x in zip(chosen, leaves, strict=True) if c], join


def pick(tree: Tree, *at: Any) -> Tree:
    """`x[at]` of every leaf."""
    return jax.tree.map(lambda x: x[at], tree)


def put_at(tree: Tree, new: Tree, *at: Any) -> Tree:
    """Every leaf with a new `x[at]`."""
    return jax.tree.map(lambda x, y: x.at[at].set(y), tree, new)


def zeros(tree: Tree, dtype: Any = None) -> Tree:
    """Zeros of the same shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def pin(x: jax.Array, spec: P | None, before: int = 0) -> jax.Array:
    """Divides an array over mesh axes; the spec, if any, is of what follows `before` dimensions."""
    if spec is None:
        return x
    inside = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(inside, P(*[None] * before, *spec)))


def pin_gradient(g: jax.Array, spec: P | None) -> jax.Array:
    """Divides a gradient as its sum is kept.

    What is not divided over `model` is whole first: the compiler would divide the product over that axis too, and then
    exchange pieces by a permutation, which waits for the devices that are at other turns.
    """
    if spec is None:
        return g
    free = jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1 and "model" not in jax.tree.leaves(tuple(spec))
    return pin(pin(g, P()) if free else g, spec)


class Stage:
    """The pieces of one device as functions.

    Attributes:
      cut: layers and pieces.
      layer: `(params of one layer, its index, carry, context) -> carry`.
      layers: parameters `[chunks, layers a piece, ...]`.
      specs: mesh axes of one layer's gradients, by floating leaves.
    """

    def __init__(self, cut: Cut, layer: Callable[..., Any], layers: Tree, specs: Sequence[P | None]) -> None:
        """As the attributes."""
        self.cut, self.layer, self.layers, self.specs = cut, layer, layers, specs

    def one(self, own: Tree, i: jax.Array, x: Any, context: Any) -> Any:
        """One layer; padding does nothing."""
        y = self.layer(own, i, x, context)
        if self.cut.layers == self.cut.each * self.cut.pieces:
            return y
        return jax.tree.map(lambda a, b: jnp.where(i < self.cut.layers, a, b), y, x)

    def sums(self) -> list[jax.Array]:
        """Zeros for the sums of gradients of the parameters' floating leaves."""
        leaves = zeros(divide(self.layers)[0], jnp.float32)
        return [pin(x, spec, 2) for x, spec in zip(leaves, self.specs, strict=True)]

    def add(self, totals: list[jax.Array], more: list[jax.Array], chunk: jax.Array, j: jax.Array) -> list[jax.Array]:
        """The sums with the gradients of a piece's layer j."""
        pairs = zip(totals, more, self.specs, strict=True)
        return [a.at[chunk, j].add(pin_gradient(g.astype(a.dtype), spec)) for a, g, spec in pairs]

    def forward(self, piece: jax.Array, x: Any, context: Any, into: Any, at: Any) -> tuple[Any, Any]:
        """(what flows out of a piece, `into` with what flows into its layers at (chunk, place))."""

        def one(state: Any, j: jax.Array) -> Any:
            x, into = state
            y = self.one(pick(self.layers, at[0], j), piece * self.cut.each + j, x, context)
            return (y, put_at(into, x, *at, j)), None

        return jax.lax.scan(one, (x, into), jnp.arange(self.cut.each))[0]

    def backward(
        self, piece: jax.Array, dy: Any, context: Any, into: Any, at: Any, sums: list[jax.Array]
    ) -> tuple[Any, Any, list[jax.Array]]:
        """(gradient of what flowed in, of the context's floating leaves, the sums with those of the parameters)."""
        context_f, context_of = divide(context)

        def one(state: Any, j: jax.Array) -> Any:
            dy, d_context, sums = state
            own_f, own_of = divide(pick(self.layers, at[0], j))
            through = lambda o, x, c: self.one(own_of(o), piece * self.cut.each + j, x, context_of(c))
            d_own, dx, more = jax.vjp(through, own_f, pick(into, *at, j), context_f)[1](dy)
            return (dx, jax.tree.map(jnp.add, d_context, more), self.add(sums, d_own, at[0], j)), None

        return jax.lax.scan(one, (dy, zeros(context_f), sums), jnp.arange(self.cut.each), reverse=True)[0]

    def backward_inputs(
        self, piece: jax.Array, dy: Any, context: Any, into: Any, at: Any, outof: Any, to: Any
    ) -> tuple[Any, Any, Any]:
        """The same without those of the parameters: `outof` with gradients of what flows out of the layers at `to`."""
        context_f, context_of = divide(context)

        def one(state: Any, j: jax.Array) -> Any:
            dy, d_context, outof = state
            own = pick(self.layers, at[0], j)
            through = lambda x, c: self.one(own, piece * self.cut.each + j, x, context_of(c))
            dx, more = jax.vjp(through, pick(into, *at, j), context_f)[1](dy)
            return (dx, jax.tree.map(jnp.add, d_context, more), put_at(outof, dy, *to, j)), None

        return jax.lax.scan(one, (dy, zeros(context_f), outof), jnp.arange(self.cut.each), reverse=True)[0]

    def weights(
        self, piece: jax.Array, context: Any, into: Any, at: Any, outof: Any, to: Any, sums: list[jax.Array]
    ) -> list[jax.Array]:
        """The sums with the gradients of the parameters, of what `backward_inputs` left."""

        def one(sums: Any, j: jax.Array) -> Any:
            own_f, own_of = divide(pick(self.layers, at[0], j))
            x, dy = pick(into, *at, j), pick(outof, *to, j)
            through = lambda o: self.one(own_of(o), piece * self.cut.each + j, x, context)
            return self.add(sums, jax.vjp(through, own_f)[1](dy)[0], at[0], j), None

        return jax.lax.scan(one, sums, jnp.arange(self.cut.each))[0]
