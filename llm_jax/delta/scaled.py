"""Vectors beside a kernel: IA3's factors and BitFit's biases.

Sources: Liu et al. 2022 (IA3: keys, values and hidden states of the feed-forward are scaled),
https://arxiv.org/abs/2205.05638; Ben Zaken et al. 2022 (BitFit: only biases train), https://arxiv.org/abs/2106.10199.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm_jax.delta.node import Bias, Delta, DeltaError
from llm_jax.nn import weights
from llm_jax.nn.execution import PRODUCT
from llm_jax.nn.weights import Axes


class Scaled(Delta):
    """`(x @ base + bias) * factor`, or with `inputs` `(x * factor) @ base + bias`.

    Attributes:
      base: any weight.
      factor: `[out]`, or `[in]` with `inputs`; ones at first (with a leading layer axis when stacked).
      inputs: scales the input and not the output. Static.
    """

    base: Any
    factor: jax.Array
    inputs: bool = struct.field(pytree_node=False, default=False)

    trains: ClassVar[tuple[str, ...]] = ("factor",)
    name: ClassVar[str] = "IA3"

    def _spread(self) -> jax.Array:
        return self.factor[..., :, None] if self.inputs else self.factor[..., None, :]

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Scales columns and bias, or rows."""
        scaled_bias = bias if bias is None or self.inputs else weights.scaled(bias, self.factor)
        return weights.scaled(matrix, self._spread()), scaled_bias

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Divides by the factors; what a factor of 0 has wiped out does not come back (not a number)."""
        spread = jnp.broadcast_to(self._spread(), matrix.shape)
        divided = bias if bias is None or self.inputs else (weights.wide(bias) / self.factor).astype(bias.dtype)
        return (weights.wide(matrix) / spread).astype(matrix.dtype), divided

    def linear(self, x: jax.Array, bias: Bias, key: jax.Array | None = None) -> jax.Array:
        """Scales the output together with the bias, or the input."""
        if self.inputs:
            return weights.linear(weights.scaled(x, self.factor), self.base, bias, key)
        product = checkpoint_name(weights.linear(x, self.base, bias, key), PRODUCT)  # the factor's gradient reads it
        return weights.scaled(product, self.factor)

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The product with the scaled matrix."""
        return self.linear(x, None, key)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """The product with the scaled matrix's transpose."""
        if self.inputs:
            return weights.scaled(weights.matmul_t(x, self.base), self.factor)
        return weights.matmul_t(weights.scaled(x, self.factor), self.base)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the scaled matrix."""
        rows = weights.take(self.base, ids)
        return weights.scaled(rows, jnp.take(self.factor, ids)[..., None] if self.inputs else self.factor)

    def axes(self, base: Axes) -> "Scaled":
        """The factor takes the axis that it scales."""
        *lead, i, o = base
        factor = Axes(*lead, i if self.inputs else o)
        return Scaled(weights.axes_of(self.base, base), factor, self.inputs)  # type: ignore[arg-type]


class Biased(Delta):
    """`x @ base + bias + shift`: a bias for a kernel, also where its module has none.

    Attributes:
      base: any weight.
      shift: `[out]`, zeros at first (with a leading layer axis when stacked).
    """

    base: Any
    shift: jax.Array

    trains: ClassVar[tuple[str, ...]] = ("shift",)
    name: ClassVar[str] = "bias"

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Adds the shift to the bias.

        Raises:
          DeltaError: if the module has no bias.
        """
        if bias is None:
            raise DeltaError("a bias cannot be merged into a module that has none; keep it as it is, or detach it")
        return matrix, bias + self.shift.astype(bias.dtype)

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Subtracts the shift from the bias."""
        assert bias is not None  # `fold` has refused it
        return matrix, bias - self.shift.astype(bias.dtype)

    def dense(self) -> jax.Array:
        """The base matrix, which a bias does not change."""
        return weights.dense(self.base)

    def linear(self, x: jax.Array, bias: Bias, key: jax.Array | None = None) -> jax.Array:
        """Adds the shift to the output."""
        return weights.add_bias(weights.linear(x, self.base, bias, key), self.shift)

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The product with the base: a product alone has no bias."""
        return weights.matmul(x, self.base, key)

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """The product with the base's transpose."""
        return weights.matmul_t(x, self.base)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the base."""
        return weights.take(self.base, ids)

    def axes(self, base: Axes) -> "Biased":
        """The shift takes the output axis."""
        *lead, _, o = base
        return Biased(weights.axes_of(self.base, base), Axes(*lead, o))  # type: ignore[arg-type]
