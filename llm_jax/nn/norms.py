"""Normalisation, computed in float32 whatever the activations are.

Under `jax.checkpoint` the backward pass keeps the input of a norm and its statistics, a number or two a position.

Sources: Ba et al. 2016, https://arxiv.org/abs/1607.06450; Zhang and Sennrich 2019,
https://arxiv.org/abs/1910.07467; Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import weights
from llm_jax.nn.execution import NORM
from llm_jax.nn.linear import scale_last

_POLICY = jax.checkpoint_policies.save_only_these_names(NORM)


def _mean(x: jax.Array) -> jax.Array:
    return checkpoint_name(jnp.mean(x, axis=-1), NORM)[..., None]


@functools.partial(jax.checkpoint, static_argnums=(3,), policy=_POLICY)
def _layer_norm(x, scale, bias, eps):
    y = weights.wide(x)
    y = y - _mean(y)
    y = y * jax.lax.rsqrt(_mean(jnp.square(y)) + eps)
    y = scale_last(y, weights.wide(scale))
    return weights.add_bias(y, bias).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=(2,), policy=_POLICY)
def _rms_norm(x, scale, eps):
    y = weights.wide(x)
    y = y * jax.lax.rsqrt(_mean(jnp.square(y)) + eps)
    return scale_last(y, weights.wide(scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Centres and scales each position over its features."""

    eps: float = 1e-5
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis of `[..., D]`; the dtype stays."""
        scale = weights.parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("norm",))
        bias = None
        if self.use_bias:
            bias = weights.parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], ("norm",))
        return _layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """Scales each position by its root mean square; no centring, no bias."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis of `[..., D]`; the dtype stays."""
        scale = weights.parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("norm",))
        return _rms_norm(x, scale, self.eps)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over real tokens, in training mode; here for contrast with layer norm only.

    A position's output depends on the other rows of the batch and on their lengths, which is why language
    models do not use it.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Statistics of each feature over the positions where `mask_BT` is true."""
        y = weights.wide(x_BTD)
        m = mask_BT[:, :, None].astype(y.dtype)
        total = jnp.maximum(jnp.sum(m), 1)
        y = y - jnp.sum(y * m, axis=(0, 1), keepdims=True) / total
        y = y * jax.lax.rsqrt(jnp.sum(jnp.square(y) * m, axis=(0, 1), keepdims=True) / total + self.eps)
        scale = weights.parameter(self, "scale", nn.initializers.ones, x_BTD.shape[-1:], ("norm",))
        y = scale_last(y, weights.wide(scale))
        bias = weights.parameter(self, "bias", nn.initializers.zeros, x_BTD.shape[-1:], ("norm",))
        return weights.add_bias(y, bias).astype(x_BTD.dtype)
