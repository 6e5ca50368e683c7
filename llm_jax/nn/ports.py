"""Ports: where something may be plugged into a block.

A port is the identity while no node stands under its name in the parameters, and calls the node when one does.
Attaching is adding nodes to the tree, detaching is dropping them; the model's code does not change.

Ports of a block: `attention/adapter`, `mlp/adapter` (on the sublayer's output), `attention/parallel_adapter`,
`mlp/parallel_adapter` (from the sublayer's input, added to its output), `attention/prefix` (keys and values in
front), and `embed/prompt` (vectors in front of the text).
"""

from typing import Any

import jax

from llm_jax.nn import weights


class PortNode(weights.Node):
    """What may be plugged in; subclasses define `__call__` and `axes`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps activations to activations of the same shape."""
        raise TypeError(f"{type(self).__name__} does not say what it computes: define __call__")

    def axes(self, base: Any = None) -> "PortNode":
        """Logical axes of the leaves (replicated unless a subclass says more)."""
        del base
        return jax.tree.map(lambda leaf: weights.Axes(*(None,) * leaf.ndim), self)


def read(module: Any, name: str) -> Any:
    """The node plugged into port `name` of a Linen module, or None."""
    if module.is_initializing() or not module.has_variable("params", name):
        return None
    node = module.get_variable("params", name)
    if not isinstance(node, PortNode):
        where = "/".join((*module.path, name))
        raise TypeError(f"{where} is a port and takes a PortNode, not {type(node).__name__}")
    return node


def sequential(module: Any, name: str, y: jax.Array) -> jax.Array:
    """`node(y)`, or `y` while the port is empty."""
    node = read(module, name)
    return y if node is None else node(y)


def parallel(module: Any, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`y + node(x)`, or `y` while the port is empty."""
    node = read(module, name)
    return y if node is None else y + node(x)
