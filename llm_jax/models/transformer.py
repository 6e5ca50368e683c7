"""The Transformer of 2017, and Marian's (opus-mt).

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Junczys-Dowmunt et al. 2018 (Marian),
https://arxiv.org/abs/1804.00344, as transformers' `modeling_marian.py` reads its checkpoints.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import linen as nn

from llm_jax.models.shared import encoder_decoder
from llm_jax.models.shared.block import BlockConfig
from llm_jax.models.shared.encoder_decoder import Arguments, Parts
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.output import Head, OutputLayer, padded_size
from llm_jax.nn.positions import Sinusoidal

SINUSOIDS = ("interleaved", "halves")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """An encoder-decoder with sinusoidal positions. The defaults are the paper's base model.

    Attributes:
      vocab_size: V, of source and target together.
      context_length: longest row, tokens.
      model_dim: D.
      num_layers: of the encoder.
      num_decoder_layers: of the decoder; None takes as many.
      num_heads: N.
      num_decoder_heads: of the decoder; None takes as many.
      hidden_dim: F.
      decoder_hidden_dim: of the decoder; None takes the same.
      activation: of the feed-forward.
      norm: `post` (the paper's) or `pre` (with a norm behind each stack).
      norm_eps: of the layer norms.
      sinusoids: sines and cosines `interleaved` (the paper's) or in two `halves` (Marian's).
      scale_embedding: rows of the table are multiplied by sqrt(D).
      tied: output layer shares the table.
      logits_bias: a bias on the output layer (Marian).
      dropout: rate on embeddings and before each residual sum.
      attention_dropout: rate on attention weights.
      activation_dropout: rate inside the feed-forward.
      init_std: of all matrices; None takes 1 / sqrt(D).
      start_id: what the decoder reads first.
      banned_ids: entries that are never generated.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 37000
    context_length: int = 1024
    model_dim: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    hidden_dim: int = 2048
    activation: str = "relu"
    norm: str = "post"
    norm_eps: float = 1e-5
    sinusoids: str = "interleaved"
    scale_embedding: bool = True
    tied: bool = True
    logits_bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float | None = None
    start_id: int = 0
    banned_ids: tuple[int, ...] = ()
    vocab_pad_multiple: int = 1
    num_decoder_heads: int | None = None
    decoder_hidden_dim: int | None = None

    reads: ClassVar[str] = "source"

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        if self.sinusoids not in SINUSOIDS:
            raise ValueError(f"sinusoids={self.sinusoids!r} is not one of {', '.join(SINUSOIDS)}")
        if self.model_dim % 2:
            raise ValueError(f"model_dim={self.model_dim} must be even for sines and cosines")
        if not 0 <= self.start_id < self.vocab_size:
            raise ValueError(f"start_id={self.start_id} lies outside of the vocabulary of {self.vocab_size}")
        _ = self.block, self.decoder_block

    @property
    def depth(self) -> tuple[int, int]:
        """Numbers of layers: (encoder, decoder)."""
        decoder = self.num_decoder_layers
        return self.num_layers, self.num_layers if decoder is None else decoder

    @property
    def block(self) -> BlockConfig:
        """Config of the encoder's layers."""
        return self._block(self.num_heads, self.hidden_dim)

    @property
    def decoder_block(self) -> BlockConfig:
        """The decoder's layers, which have cross-attention also."""
        block = self._block(self.num_decoder_heads or self.num_heads, self.decoder_hidden_dim or self.hidden_dim)
        return dataclasses.replace(block, cross=True)

    def _block(self, num_heads: int, hidden_dim: int) -> BlockConfig:
        std = self.model_dim**-0.5 if self.init_std is None else self.init_std
        positions = Sinusoidal(self.context_length, halves=self.sinusoids == "halves")
        return BlockConfig(
            attention=AttentionConfig.with_biases(
                self.model_dim, num_heads, self.attention_dropout, std, positions=positions
            ),
            hidden_dim=hidden_dim,
            activation=self.activation,
            norm=self.norm,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            activation_dropout=self.activation_dropout,
            wide=True,
        )

    def make(self, execution: Execution = Execution()) -> "Transformer":
        """Builds the model of this config."""
        return Transformer(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache of the decoder."""
        if size > self.context_length:
            raise ValueError(f"a cache of {size} exceeds the context of {self.context_length}")
        heads = self.num_decoder_heads or self.num_heads
        return init_cache(self.depth[1], batch, size, heads, self.model_dim // heads, dtype)


class Transformer(nn.Module):
    """The Transformer of 2017: an encoder and a decoder with cross-attention."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array | None,
        decoder_input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """See `encoder_decoder.Arguments` for the arguments; `train=True` needs a `dropout` key."""
        c = self.config
        std = c.model_dim**-0.5 if c.init_std is None else c.init_std
        init = nn.initializers.normal(std)
        tokens = Embedding(
            c.vocab_size, c.model_dim, c.vocab_pad_multiple, c.scale_embedding, table_init=init, name="embed"
        )

        def head(y: jax.Array) -> Head | None:
            if not c.tied:
                layer = OutputLayer(
                    c.vocab_size, c.vocab_pad_multiple, use_bias=c.logits_bias, kernel_init=init, name="head"
                )
                return layer(y)
            if not c.logits_bias:
                return tokens.head()
            rows = (padded_size(c.vocab_size, c.vocab_pad_multiple),)
            return tokens.head(weights.parameter(self, "logits_bias", nn.initializers.zeros, rows, ("vocab",)))

        def end(x: jax.Array, name: str) -> jax.Array:
            return LayerNorm(c.norm_eps, name=f"{name}_norm")(x) if c.norm == "pre" else x

        encoder, decoder = c.depth
        parts = Parts(
            encoder=(c.block, encoder),
            decoder=(c.decoder_block, decoder),
            embed=lambda ids: tokens(ids, self.execution.dtype),
            dropout=c.dropout,
            end=end,
            head=head,
            context_length=c.context_length,
        )
        arguments = Arguments(
            input_ids=input_ids,
            decoder_input_ids=decoder_input_ids,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            train=train,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return encoder_decoder.run(self, arguments, parts)
