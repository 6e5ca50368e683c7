"""The one place where a kernel meets an activation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.nn import weights
from llm_jax.nn.execution import PRODUCT

# plain products are read by nothing in a backward pass; a product that is would otherwise be computed twice
_POLICY = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def scale_last(x: jax.Array, v: jax.Array) -> jax.Array:
    """The product `x[..., D] * v[D]`, with the broadcast written out."""
    return x * jnp.broadcast_to(v, x.shape)


class Linear(nn.Module):
    """`x[..., in] @ kernel[in, features] + bias`, where `x` is the input, or `before` of several.

    Attributes:
      features: output width.
      axes: logical axes of the kernel, (input, output).
      use_bias: adds a bias.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.
      before: elementwise function of the inputs; the backward pass computes it again and saves nothing of it.
      dtype: of the product and the result; None takes that of the inputs.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)
    before: Callable[..., jax.Array] | None = None
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`."""
        x = inputs[0]
        dtype = self.dtype or x.dtype
        kernel: Any = weights.parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        key = self.make_rng("dropout") if weights.is_node(kernel) and self.has_rng("dropout") else None
        kernel, before = weights.cast(kernel, dtype), self.before
        bias = None
        if self.use_bias:
            bias = weights.parameter(self, "bias", self.bias_init, (self.features,), self.axes[1:])
        if before is None:
            return weights.linear(x.astype(dtype), kernel, bias, key)

        def product(kernel: Any, bias: jax.Array | None, *inputs: jax.Array) -> jax.Array:
            return weights.linear(before(*inputs).astype(dtype), kernel, bias, key)

        return jax.checkpoint(product, policy=_POLICY)(kernel, bias, *inputs)
