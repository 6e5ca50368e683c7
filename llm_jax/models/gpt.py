"""GPT-1 and GPT-2.

Sources: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (post-norm); Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners" (pre-norm, residual projections initialised smaller).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import linen as nn

from llm_jax.models import decoder
from llm_jax.models.output import Output
from llm_jax.nn.attention import Attention, AttentionConfig, dropout
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.output import OutputLayer
from llm_jax.nn.stack import Stack


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """A GPT. The defaults are GPT-2 small.

    Attributes:
      vocab_size: V.
      context_length: learned positions, tokens.
      model_dim: D.
      num_layers: L.
      num_heads: N.
      hidden_dim: F; None takes 4 D.
      norm: `pre` (GPT-2, with a final norm) or `post` (GPT-1).
      activation: of the feed-forward.
      norm_eps: of the layer norms.
      tied: output layer shares the token table.
      dropout: rate on embeddings and residual branches.
      attention_dropout: rate on attention weights.
      init_std: of all matrices; residual projections take init_std / sqrt(2 L) in `pre`.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    model_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int | None = None
    norm: str = "pre"
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    vocab_pad_multiple: int = 1

    def __post_init__(self) -> None:
        """Checks sizes and mode strings."""
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim={self.model_dim} is not a multiple of num_heads={self.num_heads}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r} is neither pre nor post")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")

    @property
    def out_init_std(self) -> float:
        """Standard deviation of the kernels that write into the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_layers) if self.norm == "pre" else self.init_std

    def make(self, execution: Execution = Execution()) -> "GPT":
        """The module."""
        return GPT(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache."""
        if size > self.context_length:
            raise ValueError(f"a cache of {size} exceeds the {self.context_length} learned positions")
        return init_cache(self.num_layers, batch, size, self.num_heads, self.model_dim // self.num_heads, dtype)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before (GPT-2) or after the sum (GPT-1)."""

    config: GPTConfig
    execution: Execution
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(self, x, cache, mask, slots, train=False):
        """One layer: `(x, cache) -> (x, (cache, x or None, weights or None))`."""
        c = self.config
        sizes = AttentionConfig(
            model_dim=c.model_dim,
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=c.model_dim // c.num_heads,
            qkv_bias=True,
            out_bias=True,
            dropout=c.attention_dropout,
            init_std=c.init_std,
            out_init_std=c.out_init_std,
        )
        attention = Attention(sizes, self.execution, name="attention")
        mlp = FeedForward(
            c.hidden_dim or 4 * c.model_dim, c.activation, init_std=c.init_std, out_init_std=c.out_init_std, name="mlp"
        )
        norm_1, norm_2 = LayerNorm(c.norm_eps, name="attention_norm"), LayerNorm(c.norm_eps, name="mlp_norm")
        drop = lambda y: dropout(self, y, c.dropout, train)
        attend = lambda y: attention(y, mask, None, cache, slots, train, self.output_attentions)
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


class GPT(nn.Module):
    """A decoder with learned positions."""

    config: GPTConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """See `models.decoder.prepare` for the arguments; `train=True` needs a `dropout` key."""
        c = self.config
        decoder.check_call(self, input_ids, token_type_ids, train)
        inputs = decoder.prepare(input_ids, attention_mask, position_ids, segment_ids, cache, c.context_length)
        init = nn.initializers.normal(c.init_std)
        tokens = Embedding(c.vocab_size, c.model_dim, c.vocab_pad_multiple, table_init=init, name="embed")
        places = Embedding(c.context_length, c.model_dim, vocab_axis=None, table_init=init, name="positions")
        dtype = self.execution.dtype
        x = tokens(input_ids, dtype) + places(inputs.positions_BT, dtype)
        x = first = self.execution.constrain(dropout(self, x, c.dropout, train), ("batch", "length", "embed"))
        block = functools.partial(Block, c, self.execution, output_hidden_states, output_attentions)
        stack = Stack(block, c.num_layers, execution=self.execution, name="decoder")
        x, outputs = stack(x, None if cache is None else cache.layers, (inputs.mask, inputs.slots_BT), train)
        if c.norm == "pre":
            x = LayerNorm(c.norm_eps, name="final_norm")(x)
        if c.tied:
            head = tokens.head()
        else:
            head = OutputLayer(c.vocab_size, c.vocab_pad_multiple, kernel_init=init, name="head")(x)
        return decoder.finish(x, first, outputs, head, inputs)
