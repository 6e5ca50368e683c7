"""What deltas add to a model, as a table to read."""

from typing import Any, NamedTuple

from llm_jax.delta import lora, node
from llm_jax.delta.lora import Lora
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import stack


class Sizes(NamedTuple):
    """Numbers of a tree with deltas.

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


def _count(w: node.Delta) -> int:
    if isinstance(w, Lora):
        return lora.count(w)
    return weights.count([getattr(w, field) for field in w.trains])


def sizes(params: Params) -> Sizes:
    """Counts a tree, stacked or not; abstract will do. Parameters of the model itself count as not trained."""
    params = stack(params)
    deltas = [d for w in node.of(params).values() for d in node.layers_of(w)]
    base = [node.stripped(w) for _, w in paths.flatten(params, weights.is_node)]
    trained = [[getattr(d, field) for field in d.trains] for d in deltas]
    return Sizes(weights.count(base), sum(map(_count, deltas)), weights.bytes_of(base), weights.bytes_of(trained))


def _line(path: str, w: Any) -> str:
    inner = node.stripped(w)
    shape = "x".join(map(str, weights.shape_of(w)))
    kind = type(inner).__name__ if weights.is_node(inner) else str(inner.dtype)
    added = []
    for d in node.layers_of(w):
        text = d.name
        if isinstance(d, Lora):
            ranks = f"ranks {min(d.ranks)} to {max(d.ranks)}" if d.ranks else f"rank {d.a.shape[-1]}"
            text += f" of {ranks}"
        added.append(f"{text}, {_count(d):,} numbers")
    return f"{path}  {kind}[{shape}]  {'; '.join(added)}"


def describe(params: Params) -> str:
    """Every weight that carries deltas with what was added, and what trains in all.

    Example line: `decoder/layers/mlp/up/kernel  float32[2x24x40]  LoRA of rank 8, 1,024 numbers`.
    """
    stacked = stack(params)
    lines = [_line(path, w) for path, w in node.of(stacked).items()]
    s = sizes(stacked)
    lines.append(
        f"{s.trainable:,} numbers train beside {s.base:,} ({s.share:.3%}); {s.trainable_bytes:,} bytes beside "
        f"{s.base_bytes:,}"
    )
    return "\n".join(lines)
