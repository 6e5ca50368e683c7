"""Position-wise feed-forward layers, plain and gated.

The backward pass keeps the inputs of an activation and computes it again, also for the gradient of the down kernel.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Shazeer 2020 (GLU variants),
https://arxiv.org/abs/2002.05202.
"""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import weights
from llm_jax.nn.attend import drop
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def dropped(function: Callable[..., jax.Array], rate: float, key: jax.Array) -> Callable[..., jax.Array]:
    """`function` with dropout on what it returns, the same at every call."""

    def run(*inputs: jax.Array) -> jax.Array:
        return drop(function(*inputs), rate, key)

    return run


class FeedForward(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` where gated (SwiGLU with silu, GEGLU with gelu).

    Attributes:
      hidden: F.
      activation: a key of `ACTIVATIONS`.
      gated: adds the gate.
      use_bias: biases on all kernels.
      init_std: standard deviation of the kernels.
      out_init_std: standard deviation of the down kernel; None takes init_std.
      dropout: rate behind the activation.
      execution: how it runs.
      wide: in float16, what follows the first products is in float32: products of gates pass 65504.
    """

    hidden: int
    activation: str
    gated: bool = False
    use_bias: bool = True
    init_std: float = 0.02
    out_init_std: float | None = None
    dropout: float = 0.0
    execution: Execution = Execution()
    wide: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, train: bool = False) -> jax.Array:
        """`[B, T, D]` to `[B, T, D]`; `train` turns dropout on."""
        linear = functools.partial(Linear, use_bias=self.use_bias)
        init = nn.initializers.normal(self.init_std)
        out_init = init if self.out_init_std is None else nn.initializers.normal(self.out_init_std)
        activate = ACTIVATIONS[self.activation]

        def widened(name: str) -> jax.Array:
            y_BTF = linear(self.hidden, ("embed", "mlp"), kernel_init=init, name=name)(x_BTD)
            # or a partitioner may gather whole matrices instead of a sequence
            return self.execution.constrain(y_BTF, ("batch", "length", "mlp"))

        up_BTF = widened("up")
        inputs: tuple[jax.Array, ...] = (up_BTF,)
        before: Callable[..., jax.Array] = activate
        if self.gated:
            gate_BTF = widened("gate")
            inputs, before = (gate_BTF, up_BTF), lambda gate, up: activate(gate) * up
        if train and self.dropout > 0:
            before = dropped(before, self.dropout, self.make_rng("dropout"))
        dtype = weights.wide_half(x_BTD, self.wide)

        def activated(*inputs: jax.Array) -> jax.Array:
            return before(*(x.astype(dtype) for x in inputs))

        down = linear(
            x_BTD.shape[-1], ("mlp", "embed"), kernel_init=out_init, before=activated, dtype=dtype, name="down"
        )
        return checkpoint_name(down(*inputs), "mlp")
