"""The residual block that the families share: attention and feed-forward, each with its norm before or after the sum.

Sources: Vaswani et al. 2017 (norm after the sum, dropout just before it), https://arxiv.org/abs/1706.03762; Radford et
al. 2019 and Xiong et al. 2020 (norm first), https://arxiv.org/abs/2002.04745.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm_jax.models.shared.frame import Inputs
from llm_jax.nn import ports
from llm_jax.nn.attention import Attention, AttentionConfig, AttentionLayer, Positions, View, dropout
from llm_jax.nn.cache import Cache, LayerCache
from llm_jax.nn.execution import SUM, Execution
from llm_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from llm_jax.nn.norms import LayerNorm, RMSNorm
from llm_jax.nn.protocols import Tree
from llm_jax.nn.stack import Stack


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a block is made of.

    Attributes:
      attention: sizes of the attention, and its positions.
      hidden_dim: F.
      activation: of the feed-forward.
      gated: gated feed-forward.
      mlp_bias: biases in the feed-forward.
      norm: `pre` or `post`.
      rms: RMS norms instead of layer norms.
      norm_eps: of the norms.
      dropout: rate just before each residual sum.
      activation_dropout: rate inside the feed-forward.
      cross: attends to a source between the two.
      mlp_out_init_std: of the feed-forward's second kernel; None takes the attention's `out_init_std`.
      attention_layer: what attends: a kind of `AttentionLayer`.
      wide: in float16, sublayers end in float32 and so do the residual sums, which overflow in models that were
        trained in bfloat16 (T5). transformers keeps T5's last kernel in float32 and has the same effect.
    """

    attention: AttentionConfig
    hidden_dim: int
    activation: str
    gated: bool = False
    mlp_bias: bool = True
    norm: str = "pre"
    rms: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.0
    activation_dropout: float = 0.0
    cross: bool = False
    mlp_out_init_std: float | None = None
    attention_layer: Callable[..., AttentionLayer] = Attention
    wide: bool = False

    def __post_init__(self) -> None:
        """Checks the mode strings."""
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r} is neither pre nor post")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


class Shared(struct.PyTreeNode):
    """What all layers of a stack see.

    Attributes:
      attention: what self-attention looks at, of the attention layer's own type.
      cross: what cross-attention looks at; None without.
    """

    attention: Tree
    cross: Tree = None


class Block(nn.Module):
    """One layer. Its states are one stream `[B, T, D]`, or a tree of several that share the layer's parameters."""

    config: BlockConfig
    execution: Execution
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, x: Tree, caches: tuple[Tree, LayerCache | None] | None, shared: Shared, train: bool = False
    ) -> tuple[Tree, tuple[tuple[Tree, LayerCache | None], jax.Array | None, jax.Array | None, jax.Array | None]]:
        """Attention, cross-attention where there is some, and feed-forward.

        Args:
          x: the states.
          caches: what attention and cross-attention remember of the layer.
          shared: what all layers see.
          train: dropout.

        Returns:
          (the new states; both caches, the first stream's states or None, weights of both attentions or None).
        """
        c, a = self.config, self.config.attention
        cache, cross_cache = (None, None) if caches is None else caches
        streams, structure = jax.tree.flatten(x)
        # the sums of a wide block may be in float32 while its execution says float16
        dtype = self.execution.dtype if c.wide and self.execution.dtype is not None else streams[0].dtype
        norm = functools.partial(RMSNorm if c.rms else LayerNorm, c.norm_eps)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        attention = c.attention_layer(a, self.execution, c.wide, name="attention")
        if c.cross:
            cross_norm = norm(name="cross_attention_norm")
            anywhere = dataclasses.replace(a, positions=Positions())
            cross = Attention(anywhere, self.execution, c.wide, name="cross_attention")
        mlp = FeedForward(
            hidden=c.hidden_dim,
            activation=c.activation,
            gated=c.gated,
            use_bias=c.mlp_bias,
            init_std=a.init_std,
            out_init_std=a.out_init_std if c.mlp_out_init_std is None else c.mlp_out_init_std,
            dropout=c.activation_dropout,
            execution=self.execution,
            wide=c.wide,
            name="mlp",
        )

        def before(norm: nn.Module, x: jax.Array) -> jax.Array:
            return norm(x).astype(dtype) if c.norm == "pre" else x

        def add(norm: nn.Module, sublayer: Any, x: jax.Array, inputs: jax.Array, y: jax.Array) -> jax.Array:
            normed = lambda x: norm(x).astype(dtype)
            y = dropout(self, y, c.dropout, train)
            x = x + ports.through(sublayer, y, inputs, x, normed, train)
            x = checkpoint_name(self.execution.constrain(x, ("batch", "sequence", "embed")), SUM)
            return x if c.norm == "pre" else normed(x)

        inputs = [before(attention_norm, x) for x in streams]
        states = jax.tree.unflatten(structure, inputs)
        attended, cache, shown = attention(states, shared.attention, cache, train, self.output_attentions)
        cross_shown = None
        for i, y in enumerate(jax.tree.leaves(attended)):
            x = add(attention_norm, attention, streams[i], inputs[i], y)
            if c.cross:
                states = before(cross_norm, x)
                y, cross_cache, cross_shown = cross(states, shared.cross, cross_cache, train, self.output_attentions)
                x = add(cross_norm, cross, x, states, y)
            states = before(mlp_norm, x)
            streams[i] = add(mlp_norm, mlp, x, states, mlp(states, train))
        hidden = streams[0] if self.output_hidden_states else None
        return jax.tree.unflatten(structure, streams), ((cache, cross_cache), hidden, shown, cross_shown)


def view(config: AttentionConfig, inputs: Inputs, dtype: jnp.dtype) -> View:
    """What a stack's self-attention looks at; `dtype` is that of the states."""
    shared = config.positions.shared(config, inputs.positions_BT, inputs.mask, inputs.cache is not None, dtype)
    return View(inputs.mask, inputs.slots_BT, shared)


def per_layer(cache: Cache | None) -> tuple[tuple[LayerCache, LayerCache | None], ...] | None:
    """What each block gets of the cache: its layer's entry, and the source's."""
    if cache is None:
        return None
    return tuple(zip(cache.layers, cache.cross or (None,) * len(cache.layers), strict=True))


def blocks(
    config: BlockConfig,
    num_layers: int,
    execution: Execution,
    output_hidden_states: bool,
    output_attentions: bool,
    name: str,
    num_groups: int | None = None,
    group_size: int = 1,
) -> Stack:
    """A stack of blocks, called as `stack(x, per_layer(cache), (Shared(view(...)),), train)`."""
    block = functools.partial(Block, config, execution, output_hidden_states, output_attentions)
    return Stack(block, num_layers, num_groups, execution, group_size, name=name)
