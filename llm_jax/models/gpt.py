"""GPT-1 and GPT-2, and the same with every other encoding of positions (`configs/positions.py` compares them).

Sources: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (post-norm); Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners" (pre-norm, residual projections initialised smaller).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn

from llm_jax.models.shared import frame, heads
from llm_jax.models.shared.block import BlockConfig, Shared, blocks, per_layer, view
from llm_jax.models.shared.output import Output
from llm_jax.nn.attention import AttentionConfig, Positions, dropout
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.output import Head, OutputLayer
from llm_jax.nn.positions import Alibi, Learned, Rotary, Sinusoidal
from llm_jax.nn.relative import Buckets
from llm_jax.nn.relative_scores import Deberta, Shaw, TransformerXL

# an encoding of positions is a row here, made from the config
POSITIONS: dict[str, Callable[["GPTConfig"], Positions]] = {
    "learned": lambda c: Learned(c.context_length),
    "sinusoidal": lambda c: Sinusoidal(c.context_length),
    "rotary": lambda c: Rotary(),
    "alibi": lambda c: Alibi(),
    "t5": lambda c: Buckets(max_distance=c.max_distance),
    "shaw": lambda c: Shaw(c.max_distance),
    "xlnet": lambda c: TransformerXL(),
    "deberta": lambda c: Deberta(c.max_distance),
    "none": lambda c: Positions(),
}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """A GPT. The defaults are GPT-2 small.

    Attributes:
      vocab_size: V.
      context_length: learned positions, tokens; with other positions the longest sequence.
      model_dim: D.
      num_layers: L.
      num_heads: N.
      hidden_dim: F; None takes 4 D.
      norm: `pre` (GPT-2, with a final norm) or `post` (GPT-1).
      activation: of the feed-forward.
      norm_eps: of the layer norms.
      tied: output layer shares the token table.
      positions: `learned`; `sinusoidal` (with token rows times sqrt(D), as in 2017), `rotary`, `alibi`, `t5` (32
        buckets), `shaw`, `xlnet`, `deberta` or `none`.
      max_distance: distances from here on are one to T5's, Shaw's and DeBERTa's positions.
      dropout: rate on residual branches.
      embed_dropout: rate on embeddings; None takes `dropout`.
      attention_dropout: rate on attention weights.
      init_std: of all matrices; residual projections take init_std / sqrt(2 L) in `pre`.
      head: `none`, `lm`, `classification` (of each row's last real token), `tokens` or `span` (extractive question
        answering).
      labels: names of the classes (classification, tokens); one class is regression.
      head_dropout: rate before the classes of tokens.
      pad_id: what padding holds; read by classification alone, where there is no attention_mask.
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
    positions: str = "learned"
    max_distance: int = 128
    dropout: float = 0.0
    embed_dropout: float | None = None
    attention_dropout: float = 0.0
    init_std: float = 0.02
    head: str = "lm"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head_dropout: float = 0.1
    pad_id: int | None = None
    vocab_pad_multiple: int = 1

    reads: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        """Checks sizes and mode strings."""
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} is not one of {', '.join(POSITIONS)}")
        heads.check(self.head, heads.DECODER_HEADS)
        _ = self.block

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    @property
    def block(self) -> BlockConfig:
        """The layers; in `pre` the kernels that write into the residual stream start smaller."""
        out_std = self.init_std / math.sqrt(2 * self.num_layers) if self.norm == "pre" else self.init_std
        return BlockConfig(
            attention=AttentionConfig.with_biases(
                self.model_dim,
                self.num_heads,
                self.attention_dropout,
                self.init_std,
                out_std,
                POSITIONS[self.positions](self),
            ),
            hidden_dim=self.hidden_dim or 4 * self.model_dim,
            activation=self.activation,
            norm=self.norm,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
        )

    def make(self, execution: Execution = Execution()) -> "GPT":
        """Builds the model of this config."""
        return GPT(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache."""
        length = self.block.attention.positions.length
        if length is not None and size > length:
            raise ValueError(f"a cache of {size} exceeds the {length} {self.positions} positions")
        return init_cache(self.num_layers, batch, size, self.num_heads, self.model_dim // self.num_heads, dtype)


class GPT(nn.Module):
    """The GPT decoder: a causal Transformer with a choice of position encodings."""

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
        """See `frame.read_inputs` for the arguments; `train=True` needs a `dropout` key."""
        c = self.config
        frame.check_call(self, input_ids, attention_mask, token_type_ids, train)
        inputs = frame.read_inputs(input_ids, attention_mask, position_ids, segment_ids, cache, c.context_length)
        init = nn.initializers.normal(c.init_std)
        attention, dtype = c.block.attention, self.execution.dtype
        scaled = attention.positions.scales_tokens
        tokens = Embedding(c.vocab_size, c.model_dim, c.vocab_pad_multiple, scaled, table_init=init, name="embed")
        x = attention.positions.embed(attention, tokens(input_ids, dtype), inputs.positions_BT, dtype)
        shared = Shared(view(attention, inputs, x.dtype))
        x = dropout(self, x, c.dropout if c.embed_dropout is None else c.embed_dropout, train)
        x = first = self.execution.constrain(x, ("batch", "sequence", "embed"))
        stack = blocks(c.block, c.num_layers, self.execution, output_hidden_states, output_attentions, "decoder")
        x, outputs = stack(x, per_layer(cache), (shared,), train)
        if c.norm == "pre":
            x = LayerNorm(c.norm_eps, name="final_norm")(x)
        head: Head | None = None
        if c.head == "lm" and c.tied:
            head = tokens.head()
        elif c.head == "lm":
            head = OutputLayer(c.vocab_size, c.vocab_pad_multiple, kernel_init=init, name="head")(x)
        out = frame.finish(x, first, outputs, head, inputs)
        return heads.on_decoder(self, out, input_ids, attention_mask, train, init)
