"""What deltas add to a model, as a table to read."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from llm_jax.delta import lora, node
from llm_jax.delta.lora import Lora
from llm_jax.nn import paths, weights
from llm_jax.nn.ports import PortNode
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import stack


class Sizes(NamedTuple):
    """Sizes of a tree with deltas.

    Attributes:
      base: numbers of the model below the deltas.
      trainable: numbers that train, without the padding of ranks.
      base_bytes: bytes of the model below the deltas.
      trainable_bytes: bytes of what trains, padding included.
    """

    base: int
    trainable: int
    base_bytes: int
    trainable_bytes: int

    @property
    def share(self) -> float:
        """What trains, over the model below the deltas."""
        return self.trainable / self.base


def _padding(params: Params) -> int:
    """Numbers in A and B that only fill shorter ranks up."""
    loras = [d for w in node.of(params).values() for d in node.layers_of(w) if isinstance(d, Lora)]
    return sum(weights.count((d.a, d.b)) - lora.count(d) for d in loras)


def sizes(params: Params, trainable: str | Iterable[str]) -> Sizes:
    """Counts a tree, stacked or not; abstract will do.

    Args:
      params: the tree.
      trainable: patterns of what trains, as `methods.trainable` gives them.

    Raises:
      ValueError: if a pattern matches nothing.
    """
    params = stack(params)
    flat = dict(paths.flatten(params))
    trained = [flat[path] for path in paths.select(flat, trainable)]
    flat_nodes = [w for _, w in paths.flatten(params, weights.is_node)]
    base = [node.stripped(w) for w in flat_nodes if not isinstance(w, PortNode)]
    number = weights.count(trained) - _padding(params)
    return Sizes(weights.count(base), number, weights.bytes_of(base), weights.bytes_of(trained))


def _line(path: str, w: Any) -> str:
    inner = node.stripped(w)
    shape = "x".join(map(str, weights.shape_of(w)))
    kind = type(inner).__name__ if weights.is_node(inner) else str(inner.dtype)
    added = []
    for d in node.layers_of(w):
        count = weights.count([getattr(d, field) for field in d.trains])
        text = d.name
        if isinstance(d, Lora):
            ranks = lora.ranks_of(d)
            text += f" of ranks {min(ranks)} to {max(ranks)}" if ranks else f" of rank {d.a.shape[-1]}"
            count = lora.count(d)
        added.append(f"{text}, {count:,} numbers")
    return f"{path}  {kind}[{shape}]  {'; '.join(added)}"


def describe(params: Params, trainable: str | Iterable[str] = "*") -> str:
    """Lists every weight that carries deltas with what was added, and what trains in total.

    Example line: `decoder/layers/mlp/up/kernel  float32[2x24x40]  LoRA of rank 8, 1,024 numbers`.
    """
    stacked = stack(params)
    lines = [_line(path, w) for path, w in node.of(stacked).items()]
    s = sizes(stacked, trainable)
    lines.append(
        f"{s.trainable:,} of {s.base:,} numbers train ({s.share:.3%}): {s.trainable_bytes:,} bytes over a base of "
        f"{s.base_bytes:,}"
    )
    return "\n".join(lines)
