"""Ports: where something may be plugged into a block.

A port is the identity while no node stands under its name in the parameters, and calls the node when one does.
Attaching is adding nodes to the tree, detaching is dropping them; the model's code does not change.

Ports of every `attention`, `cross_attention` and `mlp`: `adapter` (on the sublayer's output) and `parallel_adapter`
(from the sublayer's input, added to its output). A node anywhere else is an error (`check`).
"""

from typing import Any

import jax

from llm_jax.nn import paths, weights

SUBLAYERS = ("attention", "cross_attention", "mlp")
PORTS = ("adapter", "parallel_adapter")


class PortNode(weights.Node):
    """A computation that may be plugged into a port; subclasses define `__call__` and `axes`."""

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
    """`node(y)` if the port holds a node, else `y`."""
    node = read(module, name)
    return y if node is None else node(y)


def parallel(module: Any, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`y + node(x)`, or `y` while the port is empty."""
    node = read(module, name)
    return y if node is None else y + node(x)


def _unnumbered(path: str) -> str:
    """The path of a layer's parameter as the stacked tree has it, whatever the form."""
    parts = path.split("/")
    for i in [i for i, part in enumerate(parts) if part in ("layers", "per_layer")]:
        parts[i] = "layers"
        if parts[i + 1 : i + 2] and parts[i + 1].isdigit():
            parts[i + 1] = ""
    return "/".join(filter(None, parts))


def check(declared: Any, params: Any) -> None:
    """Refuses parameters that no module reads: they would train or load, and change nothing.

    Args:
      declared: the parameters that a model's `init` returns; shapes will do.
      params: those that are given to it, stacked or unstacked.

    Raises:
      ValueError: naming the path.
    """
    read = {_unnumbered(path) for path, _ in paths.flatten(declared)}
    modules = {path.rpartition("/")[0] for path in read}
    sublayers = {"/".join(m.split("/")[: i + 1]) for m in modules for i, p in enumerate(m.split("/")) if p in SUBLAYERS}
    for path, node in paths.flatten(params, weights.is_node):
        module, _, name = _unnumbered(path).rpartition("/")
        is_port = module in sublayers and name in PORTS
        if is_port if isinstance(node, PortNode) else f"{module}/{name}".lstrip("/") in read:
            continue
        what = type(node).__name__ if weights.is_node(node) else f"an array of shape {list(node.shape)}"
        raise ValueError(
            f"no module reads {path} ({what}): it would change nothing. Ports are {', '.join(PORTS)} of "
            f"{', '.join(SUBLAYERS)}; everything else must be a parameter of the model"
        )
