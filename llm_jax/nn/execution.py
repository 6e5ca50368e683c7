"""Execution: where a plan meets a model.

Everything that changes how a model runs and nothing of what it computes. Static, hashable, never saved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from llm_jax.nn.attend import Kernel
from llm_jax.nn.protocols import Tree

REMAT = ("none", "dots", "full", "every:K", "names:a,b", "offload:a,b")
# names that `checkpoint_name` gives
KERNEL = "kernel"  # what attention's kernel returns
NORM = "norm"  # a norm's statistics, a number or two a position
SUM = "sum"  # the residual stream after a sublayer
PRODUCT = "product"  # a product that a delta multiplies by factors, whose gradient reads it
ATTENTION = ("auto", "reference", "fused", "chunked")


def _unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    del axes
    return x


class Call(NamedTuple):
    """What a stack (`nn.stack.Stack`) hands to a runner instead of running its loop.

    Attributes:
      path: where the stack is in the model; its parameters are below it, at `layers`.
      layer: `(params, index, carry, inputs, context) -> (carry, output, sown)`.
      params: the parameter sets, stacked or unstacked.
      group_of: the number of each layer's parameter set.
      carry: what flows from layer to layer.
      per_layer: per-layer inputs or None.
      context: what all layers see, dropout's key included.
    """

    path: tuple[str, ...]
    layer: Callable[[Tree, Any, Tree, Tree, Tree], tuple[Tree, Tree, Tree]]
    params: Tree
    group_of: tuple[int, ...]
    carry: Tree
    per_layer: tuple[Tree, ...] | None
    context: Tree


StackRunner: TypeAlias = Callable[[Call], tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs.

    Attributes:
      remat: what the backward pass recomputes: `none` (save everything), `dots` (save matrix products, what attention's
        kernel returns and norms' statistics), `full` (save block inputs), `every:K` (save the input of every K-th
        block), `names:a,b` (save block inputs and what blocks named with `checkpoint_name`, e.g.
        `names:attention,mlp`), `offload:a,b` (named ones lie in host memory; with `offload:block`, block inputs do,
        and the device keeps one block's, whatever the depth).
      attention: `reference`, `fused`, `chunked`, or `auto`: fused where nothing asks for the weights or for
        dropout.
      kernel: attention by a kernel where it fits; None for the compiler's own.
      dtype: compute dtype of activations and kernels; None keeps that of the parameters.
      constrain: `(x, logical axes) -> x`, pins the sharding of activations.
      stack_runner: replaces the loop over a stack's layers: `Call -> (carry, outputs)`.
    """

    remat: str = "none"
    attention: str = "auto"
    kernel: Kernel | None = None
    dtype: Any = None
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = _unconstrained
    stack_runner: StackRunner | None = None

    def __post_init__(self) -> None:
        """Checks the mode strings."""
        kind, _, rest = self.remat.partition(":")
        valid = {"none": not rest, "dots": not rest, "full": not rest, "names": bool(rest), "offload": bool(rest)}
        if not (valid.get(kind, False) or (kind == "every" and rest.isdigit() and int(rest) > 0)):
            raise ValueError(f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is not one of {', '.join(ATTENTION)}")

    def remat_every(self) -> int:
        """How many blocks share one checkpoint; 0 without rematerialisation."""
        kind, _, rest = self.remat.partition(":")
        return 0 if kind == "none" else int(rest) if kind == "every" else 1

    def remat_policy(self) -> Any:
        """The `jax.checkpoint` policy of `remat`."""
        kind, _, rest = self.remat.partition(":")
        policies = jax.checkpoint_policies
        if kind == "dots":
            return policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KERNEL, NORM, SUM)
            )
        if kind == "names":
            return policies.save_only_these_names(*rest.split(","))
        if kind == "offload":
            where = dict(offload_src="device", offload_dst="pinned_host")
            names = dict(names_which_can_be_saved=[], names_which_can_be_offloaded=rest.split(","))
            return policies.save_and_offload_only_these_names(**names, **where)
        return policies.nothing_saveable
