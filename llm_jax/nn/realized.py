"""Realized nodes: what is stored and trained in one form, and computes in another.

A `Weight` changes how a kernel multiplies, every time it multiplies. A `Realized` node becomes ordinary parameters
once, before the model is applied: prompts that a small network makes, a matrix whose gates are rounded.
`realize` puts in the node's place what the node returns:

    embed/prompt         Prompt           ->    embed/prompt    float32[n, D]
    embed/prompt/seeds   float32[n, D]    trains
    embed/prompt/lstm    ...              trains

A training step realizes once, whatever its micro-batches or stages: gradients are summed for the realized parameters
and pulled back through the node at the end (`split`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.nn import weights
from llm_jax.nn.protocols import Params, Tree


class Realized(weights.Node):
    """A node that becomes parameters before the model is applied; subclasses define `realize`.

    Below `layers` in a stacked tree every leaf has a leading layer axis, and what `realize` returns has it too.
    """

    def realize(self) -> Tree:
        """What stands in this node's place: an array, a structured weight, a port's node, or a dict of them."""
        raise TypeError(f"{type(self).__name__} does not say what it becomes: define realize()")

    @property
    def shape(self) -> tuple[int, ...]:
        """Refused: a model reads what the node becomes.

        Raises:
          TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} is not realized: call nn.realized.realize(params) before the model")

    def axes(self, base: weights.Axes | None) -> "Realized":
        """Logical axes of the leaves: that of layers where the node has one, else replicated."""
        first = ("layers",) if base is not None and tuple(base)[:1] == ("layers",) else (None,)
        return jax.tree.map(lambda leaf: weights.Axes(*(first * leaf.ndim)[:1], *(None,) * (leaf.ndim - 1)), self)


def is_realized(x: Any) -> bool:
    """Whether `x` is a node that must become parameters first."""
    return isinstance(x, Realized)


def has_any(params: Params) -> bool:
    """Whether a tree holds nodes that must become parameters first, structured weights included."""
    return any(map(is_realized, jax.tree.leaves(params, is_leaf=is_realized)))


def realize(params: Params) -> Params:
    """Replaces every realized node by what it becomes; a tree without any is returned as it is."""
    if not has_any(params):
        return params
    become = lambda x: realize(x.realize()) if is_realized(x) else x
    return jax.tree.map(become, params, is_leaf=is_realized)


def shapes(params: Params) -> Params:
    """The tree that `realize` returns, abstract where there are nodes; computes nothing."""
    return jax.eval_shape(realize, params) if has_any(params) else params


def _joined(trainable: Tree, frozen: Tree) -> Tree:
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)


def _in_two(tree: Tree) -> tuple[Tree, Tree]:
    """(floating leaves, the others), None standing for the leaves of the other part."""
    floats = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)
    return floats, jax.tree.map(lambda x: None if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _typed(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda g, x: g.astype(x.dtype), tree, like)


def split(trainable: Params, frozen: Params) -> tuple[Params, Params, Callable[[Params], Params]]:
    """Realizes the two parts of a tree, and keeps the way back for gradients.

    Args:
      trainable: what trains, with None for the leaves of the other part.
      frozen: the rest, likewise.

    Returns:
      (what learns of the realized tree, its rest, both with None as above; a function from gradients with respect to
      the first to gradients with respect to `trainable`). All floating parameters of a node learn where any leaf of the
      node trains. Other gradients pass unchanged.
    """
    stops = lambda x: x is None or is_realized(x)
    form: Any
    items, form = jax.tree.flatten(trainable, is_leaf=stops)
    learn: list[Tree] = []
    rest: list[Tree] = []
    pulls: list[Callable[[Tree], Tree]] = []
    for item, fixed in zip(items, form.flatten_up_to(frozen), strict=True):
        if not is_realized(item):
            learns, stays, pull = item, fixed, lambda g: g
        elif jax.tree.leaves(item):
            become = lambda item, fixed=fixed: _in_two(realize(_joined(item, fixed).realize()))
            learns, pull_all, stays = jax.vjp(become, item, has_aux=True)
            pull = lambda g, pull_all=pull_all, learns=learns: pull_all(_typed(g, learns))[0]
        else:
            stays = realize(_joined(item, fixed).realize())
            learns, pull = jax.tree.map(lambda _: None, stays), lambda g, item=item: item
        learn.append(learns)
        rest.append(stays)
        pulls.append(pull)

    def pull_back(grads: Params) -> Params:
        found = form.flatten_up_to(grads)
        return form.unflatten([pull(g) for pull, g in zip(pulls, found, strict=True)])

    return form.unflatten(learn), form.unflatten(rest), pull_back
