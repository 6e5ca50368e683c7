"""The residual block that the families share: attention and feed-forward, each with its norm before or after the sum.

Sources: Vaswani et al. 2017 (norm after the sum, dropout just before it), https://arxiv.org/abs/1706.03762; Radford et
al. 2019 and Xiong et al. 2020 (norm first), https://arxiv.org/abs/2002.04745.
"""

import dataclasses
import functools

import jax
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import Attention, AttentionConfig, dropout
from llm_jax.nn.cache import Cache, LayerCache
from llm_jax.nn.execution import SUM, Execution
from llm_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from llm_jax.nn.norms import LayerNorm, RMSNorm
from llm_jax.nn.stack import Stack


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a block is made of.

    Attributes:
      attention: sizes of the attention.
      hidden_dim: F.
      activation: of the feed-forward.
      gated: gated feed-forward.
      mlp_bias: biases in the feed-forward.
      norm: `pre` or `post`.
      rms: RMS norms in the place of layer norms.
      norm_eps: of the norms.
      dropout: rate just before each residual sum.
      activation_dropout: rate inside the feed-forward.
      cross: attends to a source between the two.
      mlp_out_init_std: of the feed-forward's second kernel; None takes the attention's `out_init_std`.
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
    wide: bool = False

    def __post_init__(self) -> None:
        """Checks the mode strings."""
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r} is neither pre nor post")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")


class Shared(struct.PyTreeNode):
    """What all layers of a stack see.

    Attributes:
      mask: who may look where.
      slots_BT: cache slots of the new tokens, None without a cache.
      rotary: tables of rotary positions.
      bias_BNTS: added to the scores of self-attention.
      source_BSD: what cross-attention looks at; None where the cache has it.
      source_mask: which of that is real.
      distances_PD: table of distances (DeBERTa).
    """

    mask: Mask
    slots_BT: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    bias_BNTS: jax.Array | None = None
    source_BSD: jax.Array | None = None
    source_mask: Mask | None = None
    distances_PD: jax.Array | None = None


class Block(nn.Module):
    """One layer."""

    config: BlockConfig
    execution: Execution
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(self, x, caches, shared, train=False):
        """`(x, (cache, cross cache)) -> (x, (both caches, x or None, weights or None, cross weights or None))`."""
        c, a, s = self.config, self.config.attention, shared
        norm = functools.partial(RMSNorm if c.rms else LayerNorm, c.norm_eps)
        cache, cross_cache = (None, None) if caches is None else caches
        cross_shown = None
        # the sums of a wide block may be in float32 while its execution says float16
        dtype = self.execution.dtype if c.wide and self.execution.dtype is not None else x.dtype

        def add(x, name, sublayer):
            around = norm(name=name)
            y, *rest = sublayer(around(x).astype(dtype) if c.norm == "pre" else x)
            x = x + dropout(self, y, c.dropout, train)
            x = checkpoint_name(self.execution.constrain(x, ("batch", "sequence", "embed")), SUM)
            return (x if c.norm == "pre" else around(x).astype(dtype)), *rest

        attention = Attention(a, self.execution, c.wide, name="attention")
        attend = lambda y: attention(
            *(y, s.mask, s.rotary, cache, s.slots_BT, train, self.output_attentions, s.bias_BNTS),
            distances_PD=s.distances_PD,
        )
        x, cache, shown = add(x, "attention_norm", attend)
        if c.cross:
            cross = Attention(a, self.execution, c.wide, name="cross_attention")
            look = lambda y: cross(
                *(y, s.source_mask, None, cross_cache, None, train, self.output_attentions, None, s.source_BSD)
            )
            x, cross_cache, cross_shown = add(x, "cross_attention_norm", look)
        std, out_std = a.init_std, c.mlp_out_init_std if c.mlp_out_init_std is not None else a.out_init_std
        mlp = FeedForward(
            *(
                c.hidden_dim,
                c.activation,
                c.gated,
                c.mlp_bias,
                std,
                out_std,
                c.activation_dropout,
                self.execution,
                c.wide,
            ),
            name="mlp",
        )
        (x,) = add(x, "mlp_norm", lambda y: (mlp(y, train),))
        return x, ((cache, cross_cache), x if self.output_hidden_states else None, shown, cross_shown)


def per_layer(cache: Cache | None) -> tuple[tuple[LayerCache, LayerCache | None], ...] | None:
    """What each block gets of the cache: its own and the source's."""
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
    """A stack of blocks, called as `stack(x, per_layer(cache), (Shared(...),), train)`."""
    block = functools.partial(Block, config, execution, output_hidden_states, output_attentions)
    return Stack(block, num_layers, num_groups, execution, group_size, name=name)
