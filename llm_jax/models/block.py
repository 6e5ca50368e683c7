"""The residual block that the families share: attention and feed-forward, each with its norm before or after the sum.

Sources: Vaswani et al. 2017 (norm after the sum, dropout just before it), https://arxiv.org/abs/1706.03762; Radford et
al. 2019 and Xiong et al. 2020 (norm first), https://arxiv.org/abs/2002.04745.
"""

import dataclasses
import functools

from flax import linen as nn

from llm_jax.nn.attention import Attention, AttentionConfig, dropout
from llm_jax.nn.execution import Execution
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

    def __post_init__(self) -> None:
        """Checks the mode strings."""
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r} is neither pre nor post")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")


class Block(nn.Module):
    """One layer."""

    config: BlockConfig
    execution: Execution
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(self, x, cache, mask, slots, rotary=None, train=False):
        """`(x, cache) -> (x, (cache, x or None, weights or None))`."""
        c, a = self.config, self.config.attention
        attention = Attention(a, self.execution, name="attention")
        mlp = FeedForward(c.hidden_dim, c.activation, c.gated, c.mlp_bias, a.init_std, a.out_init_std, name="mlp")
        norm = functools.partial(RMSNorm if c.rms else LayerNorm, c.norm_eps)
        norm_1, norm_2 = norm(name="attention_norm"), norm(name="mlp_norm")
        drop = lambda y: dropout(self, y, c.dropout, train)
        attend = lambda y: attention(y, mask, rotary, cache, slots, train, self.output_attentions)
        if c.norm == "pre":
            y, cache, shown = attend(norm_1(x))
            x = x + drop(y)
            x = x + drop(mlp(norm_2(x)))
        else:
            y, cache, shown = attend(x)
            x = norm_1(x + drop(y))
            x = norm_2(x + drop(mlp(x)))
        x = self.execution.constrain(x, ("batch", "length", "embed"))
        return x, (cache, x if self.output_hidden_states else None, shown)


def blocks(
    config: BlockConfig,
    num_layers: int,
    execution: Execution,
    output_hidden_states: bool,
    output_attentions: bool,
    name: str,
    num_groups: int | None = None,
) -> Stack:
    """A stack of blocks, called as `stack(x, cache layers or None, (mask, slots, rotary or None), train)`."""
    block = functools.partial(Block, config, execution, output_hidden_states, output_attentions)
    return Stack(block, num_layers, num_groups, execution, name=name)
