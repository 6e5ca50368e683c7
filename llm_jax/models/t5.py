"""T5: 1.0 (ReLU, tied) and 1.1 or FLAN (gated GELU, untied).

Its states pass float16's largest number, since it was trained in bfloat16. In float16 the last product of every
sublayer and the residual sums are therefore in float32 (transformers keeps the kernel `wo` in float32).

Sources: Raffel et al. 2020, https://arxiv.org/abs/1910.10683; Shazeer 2020 (gates), https://arxiv.org/abs/2002.05202;
the released configurations of 1.1, https://github.com/google-research/text-to-text-transfer-transformer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.shared import encoder_decoder, frame, heads
from llm_jax.models.shared.block import BlockConfig
from llm_jax.models.shared.encoder_decoder import Arguments, Parts
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import AttentionConfig, dropout
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.norms import RMSNorm
from llm_jax.nn.output import Head, OutputLayer
from llm_jax.nn.relative import Buckets


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5. The defaults are T5 1.0 small.

    Attributes:
      vocab_size: V.
      context_length: longest row in training and generation, tokens; positions have no end.
      model_dim: D.
      num_layers: of the encoder.
      num_decoder_layers: of the decoder; None takes as many.
      num_heads: N.
      head_dim: H; N H may differ from D.
      hidden_dim: F.
      activation: of the feed-forward, `relu` (1.0) or `gelu_tanh` (1.1).
      gated: gated feed-forward (1.1).
      num_buckets: of relative positions.
      max_distance: positions further apart share a bucket.
      norm_eps: of the RMS norms.
      tied: output layer shares the token table (1.0).
      scale_output: the last state is divided by sqrt(D) before the output layer (1.0).
      decoder: False leaves the encoder alone.
      head: `none`, `lm` (where there is a decoder), `classification` (the decoder reads the source again, until its
        last `end_id`), `tokens` (of the encoder alone) or `span` (extractive question answering, by the decoder too).
      labels: names of the classes (classification, tokens); one class is regression.
      head_dropout: rate before a classifier's layers.
      dropout: one rate for embeddings, weights, feed-forward, residual sums and the last states.
      init_factor: multiplies the paper's initial standard deviations.
      start_id: what the decoder reads first (the padding).
      end_id: what ends a source; read by classification alone.
      banned_ids: entries that are never generated.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 32128
    context_length: int = 512
    model_dim: int = 512
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    head_dim: int = 64
    hidden_dim: int = 2048
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tied: bool = True
    scale_output: bool = True
    decoder: bool = True
    head: str = "lm"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head_dropout: float = 0.0
    dropout: float = 0.1
    init_factor: float = 1.0
    start_id: int = 0
    end_id: int = 1
    banned_ids: tuple[int, ...] = ()
    vocab_pad_multiple: int = 1

    reads: ClassVar[str] = "source"

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} must be a multiple of 4")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(f"max_distance={self.max_distance} must exceed num_buckets / 2 = {self.num_buckets // 2}")
        heads.check(self.head, heads.DECODER_HEADS)
        if self.decoder is (self.head == "tokens") and self.head in ("classification", "tokens", "span"):
            raise ValueError(f"head={self.head!r} needs decoder={not self.decoder}")
        _ = self.block

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    @property
    def depth(self) -> tuple[int, int]:
        """Numbers of layers: (encoder, decoder)."""
        decoder = self.num_decoder_layers
        return self.num_layers, self.num_layers if decoder is None else decoder

    @property
    def block(self) -> BlockConfig:
        """Config of the encoder's layers."""
        return self._block(bidirectional=True)

    @property
    def decoder_block(self) -> BlockConfig:
        """The decoder's layers, which have cross-attention also."""
        return dataclasses.replace(self._block(bidirectional=False), cross=True)

    def _block(self, bidirectional: bool) -> BlockConfig:
        c, d = self, self.model_dim
        name = "encoder_positions" if bidirectional else "decoder_positions"
        attention = AttentionConfig(
            model_dim=d,
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_dim=c.head_dim,
            dropout=c.dropout,
            scaled=False,
            init_std=c.init_factor * d**-0.5,
            out_init_std=c.init_factor * (c.num_heads * c.head_dim) ** -0.5,
            query_init_std=c.init_factor * (d * c.head_dim) ** -0.5,
            positions=Buckets(c.num_buckets, c.max_distance, bidirectional, name),
        )
        return BlockConfig(
            attention=attention,
            hidden_dim=c.hidden_dim,
            activation=c.activation,
            gated=c.gated,
            mlp_bias=False,
            rms=True,
            norm_eps=c.norm_eps,
            dropout=c.dropout,
            activation_dropout=c.dropout,
            mlp_out_init_std=c.init_factor * c.hidden_dim**-0.5,
            wide=True,
        )

    def make(self, execution: Execution = Execution()) -> "T5":
        """Builds the model of this config."""
        return T5(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache of the decoder."""
        return init_cache(self.depth[1], batch, size, self.num_heads, self.head_dim, dtype)


class T5(nn.Module):
    """T5: an encoder-decoder with relative position buckets."""

    config: T5Config
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
        """See `encoder_decoder.Arguments` for the arguments; `train=True` needs a `dropout` key.

        With the heads `classification` and `span` the decoder's input is the source, shifted by one.

        Raises:
          ValueError: also where a row has no `end_id` for classification (seen outside of `jit` only).
        """
        c = self.config
        if not c.decoder and (decoder_input_ids is not None or cache is not None):
            raise ValueError("this T5 is an encoder alone: it takes no decoder_input_ids and no cache")
        if c.head in ("classification", "span"):
            if input_ids is None or any(x is not None for x in (decoder_input_ids, decoder_attention_mask, cache)):
                raise ValueError(
                    f"a T5 with head={c.head!r} feeds its decoder the source: give input_ids and their mask"
                )
            frame.check_call(self, input_ids, attention_mask, None, train)
            decoder_input_ids, decoder_attention_mask = self._shifted(input_ids, attention_mask), attention_mask
        init = nn.initializers.normal(c.init_factor)
        tokens = Embedding(c.vocab_size, c.model_dim, c.vocab_pad_multiple, table_init=init, name="embed")

        def head(y: jax.Array) -> Head | None:
            if c.head != "lm":
                return None
            if c.tied:
                return tokens.head()
            # t5x's scale; transformers' 1.0 makes huge logits
            small = nn.initializers.normal(c.init_factor * c.model_dim**-0.5)
            return OutputLayer(c.vocab_size, c.vocab_pad_multiple, kernel_init=small, name="head")(y)

        def end(x: jax.Array, name: str) -> jax.Array:
            return dropout(self, RMSNorm(c.norm_eps, name=f"{name}_norm")(x), c.dropout, train)

        encoder, decoder = c.depth
        parts = Parts(
            encoder=(c.block, encoder),
            decoder=(c.decoder_block, decoder),
            embed=lambda ids: tokens(ids, self.execution.dtype),
            dropout=c.dropout,
            end=end,
            head=head,
            context_length=None,
            decodes=c.decoder,
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
        out = encoder_decoder.run(self, arguments, parts)
        if c.head not in ("none", "lm"):
            return self._labelled(out, input_ids, attention_mask, train)
        if out.head is None or not c.scale_output or out.last_hidden_state is None:
            return out
        scaled = weights.scaled(out.last_hidden_state, c.model_dim**-0.5)
        return out.replace(head_input_BTE=scaled, logits=out.head.logits(scaled))

    def _shifted(self, ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """What the decoder reads: the start token just before every row's first real token, then the row."""
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.start_id)
        if attention_mask is None:
            return before
        real = jnp.pad(attention_mask[:, :-1].astype(bool), ((0, 0), (1, 0)))
        return jnp.where(real, before, self.config.start_id)

    def _labelled(self, out: Any, ids: Any, attention_mask: Any, train: bool) -> Output:
        c = self.config
        # t5x's scale, as for the output layer; transformers' 1.0 makes huge logits of tokens
        init = nn.initializers.normal(c.init_factor * c.model_dim**-0.5)
        if c.head == "classification":
            real = jnp.ones(ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
            ends = real & (ids == c.end_id)
            ended = jnp.any(ends, axis=1, keepdims=True)
            if frame.is_concrete(ended) and not self.is_initializing() and not ended.all():
                row = int(jnp.argmin(ended))
                raise ValueError(f"row {row} of input_ids has no end_id={c.end_id}, where its classes are read")
            h_BD = heads.last_states(out.last_hidden_state, jnp.where(ended, ends, real))
            pool = Linear(c.model_dim, ("embed", "embed"), kernel_init=init, name="pooler")
            out = out.replace(pooler_output=jnp.tanh(pool(dropout(self, h_BD, c.head_dropout, train))))
        rate = 0.0 if c.head == "span" else c.head_dropout
        return out.replace(logits=heads.label_logits(self, out, rate, train, init, attention_mask))
