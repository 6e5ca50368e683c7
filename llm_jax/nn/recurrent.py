"""LSTMs with projection and clipping, and highway layers.

Sources: Sak et al. 2014 (projection), https://arxiv.org/abs/1402.1128; Srivastava et al. 2015 (highways),
https://arxiv.org/abs/1505.00387; gate order, forget bias and clipping as in the `LSTMCell` of TensorFlow 1 that Peters
et al. 2018 used, https://github.com/allenai/bilm-tf.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from llm_jax.nn import weights
from llm_jax.nn.linear import Linear

FORGET_BIAS = 1.0  # added at run time, so that it is not in the bias


class LstmState(struct.PyTreeNode):
    """What an LSTM remembers.

    Attributes:
      cell_BH: the cell.
      output_BP: its last projected output.
    """

    cell_BH: jax.Array
    output_BP: jax.Array

    @classmethod
    def zeros(cls, batch: int, hidden: int, features: int, dtype: jnp.dtype = jnp.float32) -> "LstmState":
        """State at the beginning of a text."""
        return cls(jnp.zeros((batch, hidden), dtype), jnp.zeros((batch, features), dtype))


def _clip(x: jax.Array, bound: float | None) -> jax.Array:
    return x if bound is None else jnp.clip(x, -bound, bound)


class Lstm(nn.Module):
    """One layer in one direction.

    Attributes:
      hidden: H, width of the cell.
      features: P, width of the projected output; None projects nothing, and P is H.
      cell_clip: bound on the cell, None for none.
      projection_clip: bound on the output.
      reverse: reads from the end.
      kernel_init: initialiser of all kernels.
    """

    hidden: int
    features: int | None
    cell_clip: float | None = None
    projection_clip: float | None = None
    reverse: bool = False
    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, state: LstmState) -> tuple[jax.Array, LstmState]:
        """Reads a row; where `real_BT` is false nothing is read and the output is zero.

        Returns:
          (outputs `[B, T, P]`, the state after the last token read).
        """
        param = functools.partial(weights.parameter, self)
        gates = Linear(4 * self.hidden, ("embed", "mlp"), kernel_init=self.kernel_init, name="input")(x_BTD)
        width = self.hidden if self.features is None else self.features
        recurrent = weights.cast(
            param("recurrent", self.kernel_init, (width, 4 * self.hidden), ("embed", "mlp")), x_BTD.dtype
        )
        projection = None
        if self.features is not None:
            projection = weights.cast(
                param("projection", self.kernel_init, (self.hidden, width), ("mlp", "embed")), x_BTD.dtype
            )

        def read(state: LstmState, inputs: tuple[jax.Array, jax.Array]) -> tuple[LstmState, jax.Array]:
            x, real = inputs
            i, j, f, o = jnp.split(x + weights.matmul(state.output_BP, recurrent), 4, axis=-1)
            cell = jax.nn.sigmoid(f + FORGET_BIAS) * state.cell_BH + jax.nn.sigmoid(i) * jnp.tanh(j)
            cell = _clip(cell, self.cell_clip)
            output = jax.nn.sigmoid(o) * jnp.tanh(cell)
            if projection is not None:
                output = _clip(weights.matmul(output, projection), self.projection_clip)

            def where_real(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(jnp.broadcast_to(real[:, None], new.shape), new, old)

            new = LstmState(where_real(cell, state.cell_BH), where_real(output, state.output_BP))
            return new, where_real(output, jnp.zeros_like(output))

        steps = (gates.swapaxes(0, 1), real_BT.T)
        state = jax.tree.map(lambda s: s.astype(x_BTD.dtype), state)
        state, outputs = jax.lax.scan(read, state, steps, reverse=self.reverse)
        return outputs.swapaxes(0, 1), state


class Highway(nn.Module):
    """`c * relu(transform(x)) + (1 - c) * x` with `c = sigmoid(carry(x))`.

    The original calls the gate `carry` although it multiplies the transformed value; so do its files.
    """

    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """One highway layer: maps `[..., D]` to `[..., D]`."""
        layer = functools.partial(Linear, x.shape[-1], ("embed", "embed"), kernel_init=self.kernel_init)
        closed = nn.initializers.constant(-2.0)  # a new highway passes its input on
        gate = jax.nn.sigmoid(layer(name="carry", bias_init=closed)(x))
        return gate * jax.nn.relu(layer(name="transform")(x)) + (1 - gate) * x
