"""Ports: where something may be plugged into a block.

A port is empty while no node stands under its name in the parameters. A node there is called beside the sublayer:
attaching is adding nodes to the tree, detaching is dropping them, and the model's code does not change.

Every `attention`, `cross_attention` and `mlp` of a block has two ports; a node anywhere else is an error (`check`).

*   `adapter`: its result replaces the sublayer's output in the residual sum.
*   `parallel_adapter`: its result is added to the sublayer's output.

The block drops out the sublayer's output before a node sees it, and drops out nothing after. So published adapters are
one line each, `bottleneck` being down, activation and up:

    class Houlsby(PortNode):  # at `adapter`: on the output, before the sum
        def __call__(self, x, residual, norm, key):
            return x + bottleneck(x)

    class Pfeiffer(PortNode):  # at `adapter`: on the sum, behind the block's own norm
        def __call__(self, x, residual, norm, key):
            return x + bottleneck(norm(x + residual))

    class Parallel(PortNode):  # at `parallel_adapter`: from the stream before the sublayer and before its norm
        def __call__(self, x, residual, norm, key):
            return scale * bottleneck(residual)

Sources: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751; Pfeiffer et al. 2021 (AdapterFusion),
https://arxiv.org/abs/2005.00247; He et al. 2022 (parallel adapters), https://arxiv.org/abs/2110.04366.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from llm_jax.nn import paths, weights

SUBLAYERS = ("attention", "cross_attention", "mlp")
PORTS = ("adapter", "parallel_adapter")
Norm: TypeAlias = Callable[[jax.Array], jax.Array]


class PortNode(weights.Node):
    """A computation that may be plugged into a port; subclasses define `__call__` and `axes`."""

    def __call__(self, x: jax.Array, residual: jax.Array, norm: Norm, key: jax.Array | None) -> jax.Array:
        """Maps activations to activations of the same shape.

        Args:
          x: `[B, T, D]`, the sublayer's output after the block's dropout; at `parallel_adapter` the sublayer's input,
            which is normed in a pre-norm block.
          residual: `[B, T, D]`, the block's stream before the sublayer, which the output is added to; not normed.
          norm: the block's own norm of this sublayer: after the sum in a post-norm block, before the sublayer in a
            pre-norm block.
          key: a dropout key while training, else None.
        """
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


def through(
    sublayer: Any, y: jax.Array, x: jax.Array, residual: jax.Array, norm: Norm, train: bool = False
) -> jax.Array:
    """A sublayer's output as the nodes in its ports change it, in its own dtype; `y` itself without nodes.

    Args:
      sublayer: the bound Linen module that the ports belong to.
      y: its output, after dropout.
      x: its input.
      residual: what its output will be added to.
      norm: its norm.
      train: whether nodes get a dropout key.
    """
    for name in PORTS:
        node = read(sublayer, name)
        if node is None:
            continue
        key = sublayer.make_rng("dropout") if train else None
        parallel = name == "parallel_adapter"
        result = node(x if parallel else y, residual, norm, key).astype(y.dtype)
        y = y + result if parallel else result
    return y


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
