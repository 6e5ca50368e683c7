"""BERT and its kin: RoBERTa, DistilBERT, ALBERT.

One encoder; what tells the four apart is a field each: token types, the offset of positions, the pooler, a factorised
embedding and layers shared in groups.

Sources: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; Liu et al. 2019 (RoBERTa),
https://arxiv.org/abs/1907.11692; Sanh et al. 2019 (DistilBERT), https://arxiv.org/abs/1910.01108; Lan et al. 2020
(ALBERT), https://arxiv.org/abs/1909.11942.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.shared import frame, heads
from llm_jax.models.shared.block import BlockConfig, Shared, blocks, per_layer, view
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import AttentionConfig, dropout
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.feed_forward import ACTIVATIONS
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.positions import Learned

POOLERS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """An encoder. The defaults are BERT base with the heads of its pre-training.

    Attributes:
      vocab_size: V.
      context_length: learned positions that text may take, tokens.
      model_dim: D.
      num_layers: L.
      num_heads: N.
      hidden_dim: F.
      activation: of the feed-forward and of the masked-LM head.
      norm_eps: of the layer norms.
      num_token_types: rows of the segment table: 2 (BERT, ALBERT), 1 (RoBERTa), 0 (DistilBERT has none).
      position_offset: rows of the position table before the first token's; RoBERTa keeps pad_id + 1 = 2.
      embedding_dim: E, width of the tables where it is not D (ALBERT).
      num_groups: sets of layer parameters, shared by consecutive layers; None means one a layer (ALBERT: 1).
      group_size: sets that run in turn before they are used again (ALBERT: 1); divides num_groups and num_layers.
      head: `none`, `masked_lm`, `pretraining` (masked LM and a pair of sentences), `classification`, `tokens`, `span`
        (extractive question answering) or `choice`.
      labels: names of the classes (classification, tokens); one class is regression.
      pooler: activation of the pooler (the first token's state through one layer), None for none.
      tied: output layer shares the token table.
      causal: a token sees none behind it: a decoder (`BertLMHeadModel` without cross-attention), whose head is
        `masked_lm` or `none`.
      dropout: rate on embeddings and residual branches.
      attention_dropout: rate on attention weights.
      head_dropout: rate before a classifier; None takes `dropout`, and none before spans.
      init_std: of all matrices.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 30522
    context_length: int = 512
    model_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    num_token_types: int = 2
    position_offset: int = 0
    embedding_dim: int | None = None
    num_groups: int | None = None
    head: str = "pretraining"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    pooler: str | None = "tanh"
    tied: bool = True
    causal: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    init_std: float = 0.02
    vocab_pad_multiple: int = 1
    group_size: int = 1

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        heads.check(self.head, heads.HEADS)
        if self.pooler is not None and self.pooler not in POOLERS:
            raise ValueError(f"pooler={self.pooler!r} is not one of {', '.join(POOLERS)}, None")
        if self.head in heads.POOLED and self.pooler is None:
            raise ValueError(f"head={self.head!r} needs a pooler")
        if self.causal and self.head not in ("none", "masked_lm"):
            raise ValueError(f"causal=True takes head='masked_lm' or 'none', not {self.head!r}")
        if self.num_groups is not None and not 1 <= self.num_groups <= self.num_layers:
            raise ValueError(f"num_groups={self.num_groups} must lie in 1..num_layers={self.num_layers}")
        if self.group_size < 1 or self.num_layers % self.group_size or (self.num_groups or 0) % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} must divide num_layers={self.num_layers} and "
                f"num_groups={self.num_groups}"
            )
        if self.group_size > 1 and self.num_groups is None:
            raise ValueError(f"group_size={self.group_size} needs num_groups: layers share no parameters without")
        _ = self.block

    @property
    def reads(self) -> str:
        """Which tokens a token can see: all, or only earlier ones."""
        return "causal" if self.causal else "both_sides"

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    @property
    def block(self) -> BlockConfig:
        """Config of the layers, whose norms follow each sum."""
        return BlockConfig(
            attention=AttentionConfig.with_biases(
                self.model_dim,
                self.num_heads,
                self.attention_dropout,
                self.init_std,
                positions=Learned(self.context_length, self.position_offset),
            ),
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            norm="post",
            norm_eps=self.norm_eps,
            dropout=self.dropout,
        )

    def make(self, execution: Execution = Execution()) -> "Bert":
        """Builds the model of this config."""
        return Bert(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache of a decoder."""
        if size > self.context_length:
            raise ValueError(f"a cache of {size} exceeds the {self.context_length} learned positions")
        return init_cache(self.num_layers, batch, size, self.num_heads, self.model_dim // self.num_heads, dtype)


class Bert(nn.Module):
    """A bidirectional encoder, or where its config is `causal` a decoder."""

    config: BertConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """See `frame.read_inputs`; `train=True` needs a `dropout` key.

        Args:
          input_ids: `[B, T]`; with the `choice` head `[B, choices, T]` (one row each also), masks and types alike.
          attention_mask: 1 = real token.
          token_type_ids: which sentence of a pair a token belongs to; zeros by default.
          position_ids: overrides the positions, which count real tokens from 0 (before `position_offset`).
          segment_ids: documents of a packed row.
          cache: what a decoder has read before.
          train: dropout.
          output_hidden_states: returns every layer's output.
          output_attentions: returns the attention weights.
        """
        c, dtype = self.config, self.execution.dtype
        if cache is not None and not c.causal:
            raise ValueError("this Bert is not a decoder and takes no cache")
        rows = input_ids.shape[:-1]
        if c.head == "choice":
            flat: Any = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
            input_ids, attention_mask, token_type_ids = flat(input_ids), flat(attention_mask), flat(token_type_ids)
            position_ids, segment_ids = flat(position_ids), flat(segment_ids)
        frame.check_call(self, input_ids, attention_mask, token_type_ids, train, c.num_token_types)
        inputs = frame.read_inputs(
            input_ids, attention_mask, position_ids, segment_ids, cache, c.context_length, causal=c.causal
        )
        init = nn.initializers.normal(c.init_std)
        width = c.embedding_dim or c.model_dim
        tokens = Embedding(c.vocab_size, width, c.vocab_pad_multiple, table_init=init, name="embed")
        attention = c.block.attention
        x = attention.positions.embed(attention, tokens(input_ids, dtype), inputs.positions_BT, dtype)
        if c.num_token_types:
            types = Embedding(c.num_token_types, width, vocab_axis=None, table_init=init, name="token_types")
            x = x + types(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids, dtype)
        x = dropout(self, LayerNorm(c.norm_eps, name="embed_norm")(x), c.dropout, train)
        if c.embedding_dim is not None:
            x = Linear(c.model_dim, ("embed", "embed"), kernel_init=init, name="embed_projection")(x)
        x = first = self.execution.constrain(x, ("batch", "sequence", "embed"))
        stack = blocks(
            c.block,
            c.num_layers,
            self.execution,
            output_hidden_states,
            output_attentions,
            "encoder",
            num_groups=c.num_groups,
            group_size=c.group_size,
        )
        x, outputs = stack(x, per_layer(cache), (Shared(view(attention, inputs, x.dtype)),), train)
        out = frame.finish(x, first, outputs, None, inputs)
        pooled: Any = None
        if c.pooler is not None:
            pool = Linear(c.model_dim, ("embed", "embed"), kernel_init=init, name="pooler")
            pooled = POOLERS[c.pooler](pool(x[:, 0]))
            out = out.replace(pooler_output=pooled)
        if c.head in ("masked_lm", "pretraining"):
            lm = heads.MaskedLMHead(width, ACTIVATIONS[c.activation], c.norm_eps, init, name="head")
            y, head = lm(x, tokens, c.tied)
            out = out.replace(logits=head.logits(y), head=head, head_input_BTE=y)
        if c.head == "pretraining":
            pair = Linear(2, ("embed", "labels"), kernel_init=init, name="pair")(pooled)
            out = out.replace(pair_logits=weights.wide(pair))
        elif c.head not in ("none", "masked_lm"):
            usual = 0.0 if c.head == "span" else c.dropout
            rate = usual if c.head_dropout is None else c.head_dropout
            logits = heads.label_logits(self, out, rate, train, init, attention_mask)
            out = out.replace(logits=logits.reshape(rows) if c.head == "choice" else logits)
        return out
