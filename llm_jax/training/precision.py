"""Mixed precision: which dtype computes, where the float32 master copy lives, and the fp16 loss scale.

Sources: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740 (it is the loss that is scaled, not the weights);
Gupta et al. 2015, https://arxiv.org/abs/1502.02551 (rounding at random).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.nn import weights

MASTERS = ("in_params", "in_optimizer", "none")
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision policy.

    Attributes:
      compute: dtype of activations and of the kernels in the products: fp32, bf16, fp16.
      master: `in_params`: parameters are float32 and cast in the step (with Adam 12 bytes a parameter, and gradients);
        `in_optimizer`: parameters and gradients are in the compute dtype, the float32 copy sits in the optimizer
        state (14 bytes and 2 of gradients, the ZeRO paper's count); `none`: there is no such copy, and updates are
        rounded up or down at random, right on average (bf16; 10 bytes and 2 of gradients).
      initial_scale: first fp16 loss scale.
      growth_interval: finite steps before the scale doubles.
    """

    compute: str = "fp32"
    master: str = "in_params"
    initial_scale: float = 2.0**15
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        """Checks the names."""
        if self.compute not in DTYPES:
            raise ValueError(f"precision={self.compute!r} is not one of {', '.join(DTYPES)}")
        if self.master not in MASTERS:
            raise ValueError(f"master={self.master!r} is not one of {', '.join(MASTERS)}")
        if self.rounds and self.compute != "bf16":
            raise ValueError(f"master=none needs precision=bf16, not {self.compute}: its updates are rounded at random")

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return DTYPES[self.compute]

    @property
    def keeps_master(self) -> bool:
        """True where the optimizer state holds the float32 copy."""
        return self.master == "in_optimizer" and self.compute != "fp32"

    @property
    def rounds(self) -> bool:
        """True where updates are rounded at random into the compute dtype."""
        return self.master == "none"

    def stored(self, params: Any) -> Any:
        """Parameters in the dtype they are stored in between steps."""
        return params if self.master == "in_params" else weights.cast(params, self.dtype)

    def cast(self, params: Any) -> Any:
        """Parameters as they compute; where any is float64, all stay as they are."""
        exact = any(x.dtype == jnp.float64 for x in jax.tree.leaves(params))
        return params if exact else weights.cast(params, self.dtype)

    def describe(self, state: Any) -> str:
        """Dtypes of what a run holds and computes, by lines.

        Args:
          state: a `TrainState`, abstract will do.
        """

        def dtypes(tree: Any) -> str:
            sizes: dict[str, int] = {}
            for x in jax.tree.leaves(tree):
                if x.ndim:  # counters say nothing
                    name = jnp.dtype(x.dtype).name
                    sizes[name] = sizes.get(name, 0) + weights.bytes_of(x)
            return ", ".join(f"{name} ({size:,} B)" for name, size in sorted(sizes.items())) or "nothing"

        compute = jnp.dtype(self.dtype).name
        copies = {
            "in_params": "the parameters, cast in every step" if compute != "float32" else "the parameters",
            "in_optimizer": f"{dtypes(state.master)}, beside the optimizer" if self.keeps_master else "the parameters",
            "none": "none: updates are rounded at random",
        }
        lines = [
            f"parameters    {dtypes(state.params)}",
            f"products      {compute}, summed in float32 where the hardware does",
            f"activations   {compute}; softmax, norms and the loss in float32",
            f"gradients     {compute}; float32 where micro-batches, rows of a table and norms are summed",
            f"master copy   {copies[self.master]}",
            f"optimizer     {dtypes(state.opt_state)}",
        ]
        if state.loss_scale is not None:
            lines.append("loss scale    dynamic: multiplies the loss before the backward pass, divides gradients after")
        if any(weights.is_node(x) for x in jax.tree.leaves(state.params, is_leaf=weights.is_node)):
            lines.append("structured    quantized weights keep integers and scales; they compute as the rest does")
        return "\n".join(lines)

    def init_scale(self) -> "LossScale | None":
        """The first loss scale; None outside fp16."""
        if self.compute != "fp16":
            return None
        return LossScale(jnp.float32(self.initial_scale), jnp.int32(0), self.growth_interval)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 in bfloat16, up or down with the probabilities that make it right on average; exact values stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


class LossScale(struct.PyTreeNode):
    """Dynamic loss scale: halves on overflow, doubles after `interval` finite steps."""

    scale: jax.Array
    good_steps: jax.Array
    interval: int = struct.field(pytree_node=False)

    def update(self, finite: jax.Array) -> "LossScale":
        """The scale for the next step."""
        grow = self.good_steps + 1 >= self.interval
        up = jnp.where(grow, jnp.minimum(self.scale * 2, 2.0**24), self.scale)
        return self.replace(
            scale=jnp.where(finite, up, jnp.maximum(self.scale / 2, 1.0)),
            good_steps=jnp.where(finite & ~grow, self.good_steps + 1, 0),
        )
