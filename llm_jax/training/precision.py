"""Mixed precision: which dtype computes, where the float32 master copy lives, and the fp16 loss scale.

Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740. It is the loss that is scaled, not the weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.nn import weights

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision policy.

    Attributes:
      compute: dtype of activations and of the kernels in the products: fp32, bf16, fp16.
      master: `in_params`: parameters are float32 and cast in the step (12 bytes a parameter with Adam);
        `in_optimizer`: parameters and gradients are in the compute dtype, the float32 copy sits in the optimizer
        state (16 bytes a parameter with Adam, the ZeRO paper's count).
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
            raise ValueError(f"precision={self.compute!r} is none of {', '.join(DTYPES)}")
        if self.master not in ("in_params", "in_optimizer"):
            raise ValueError(f"master={self.master!r} is neither in_params nor in_optimizer")

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return DTYPES[self.compute]

    @property
    def keeps_master(self) -> bool:
        """True where the optimizer state holds the float32 copy."""
        return self.master == "in_optimizer" and self.compute != "fp32"

    def stored(self, params: Any) -> Any:
        """Parameters in the dtype they are stored in between steps."""
        return weights.cast(params, self.dtype) if self.keeps_master else params

    def init_scale(self) -> "LossScale | None":
        """The first loss scale; None outside fp16."""
        if self.compute != "fp16":
            return None
        return LossScale(jnp.float32(self.initial_scale), jnp.int32(0), self.growth_interval)


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
