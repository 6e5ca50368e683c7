"""The Llama family: Llama 1-3, SmolLM2, Mistral, Qwen2/2.5, Qwen3.

Sources: Touvron et al. 2023, https://arxiv.org/abs/2302.13971; Jiang et al. 2023 (sliding window),
https://arxiv.org/abs/2310.06825; Yang et al. 2024/2025 (Qwen2: biases on q, k, v; Qwen3: norms on q, k),
https://arxiv.org/abs/2407.10671, https://arxiv.org/abs/2505.09388.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import linen as nn

from llm_jax.models.shared import frame, heads
from llm_jax.models.shared.block import BlockConfig, Shared, blocks, per_layer, view
from llm_jax.models.shared.output import Output
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.cache import Cache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.norms import RMSNorm
from llm_jax.nn.output import Head, OutputLayer
from llm_jax.nn.positions import Rotary, RotaryScaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama. The defaults are SmolLM2-135M.

    Attributes:
      vocab_size: V.
      context_length: longest sequence it was trained for; rotary positions have no end, so this limits training
        and generation only.
      model_dim: D.
      num_layers: L.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H; None takes D / N.
      hidden_dim: F.
      activation: of the gate.
      norm_eps: of the RMS norms.
      tied: output layer shares the token table.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched.
      qkv_bias: biases on query, key, value (Qwen2).
      out_bias: bias on the attention output (Llama with attention_bias).
      mlp_bias: biases in the feed-forward.
      qk_norm: norms on queries and keys (Qwen3).
      window: sliding-window width (Mistral), None for full attention.
      attention_dropout: rate on attention weights.
      init_std: of all matrices.
      head: `none`, `lm`, `classification` (of each row's last real token), `tokens` or `span` (extractive question
        answering).
      labels: names of the classes (classification, tokens); one class is regression.
      head_dropout: rate before the classes of tokens.
      pad_id: what padding holds; read by classification alone, where there is no attention_mask.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 49152
    context_length: int = 8192
    model_dim: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int | None = None
    hidden_dim: int = 1536
    activation: str = "silu"
    norm_eps: float = 1e-5
    tied: bool = True
    rope_theta: float = 100000.0
    rope_scaling: RotaryScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    attention_dropout: float = 0.0
    init_std: float = 0.02
    head: str = "lm"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head_dropout: float = 0.1
    pad_id: int | None = None
    vocab_pad_multiple: int = 1

    reads: ClassVar[str] = "causal"

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        heads.check(self.head, heads.DECODER_HEADS)
        if self.head_dim is None and self.model_dim % self.num_heads:
            raise ValueError(f"model_dim={self.model_dim} is not a multiple of num_heads={self.num_heads}")
        _ = self.block
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None")

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    @property
    def attention(self) -> AttentionConfig:
        """Sizes of the attention layers."""
        return AttentionConfig(
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim or self.model_dim // self.num_heads,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            dropout=self.attention_dropout,
            init_std=self.init_std,
            positions=Rotary(self.rope_theta, self.rope_scaling),
        )

    @property
    def block(self) -> BlockConfig:
        """Config of the layers."""
        return BlockConfig(
            attention=self.attention,
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            gated=True,
            mlp_bias=self.mlp_bias,
            rms=True,
            norm_eps=self.norm_eps,
        )

    def make(self, execution: Execution = Execution()) -> "Llama":
        """Builds the model of this config."""
        return Llama(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> Cache:
        """An empty cache."""
        return init_cache(self.num_layers, batch, size, self.num_kv_heads, self.attention.head_dim, dtype)


class Llama(nn.Module):
    """The Llama decoder: rotary positions, RMS norms, gated feed-forward."""

    config: LlamaConfig
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
        inputs = frame.read_inputs(
            input_ids, attention_mask, position_ids, segment_ids, cache, c.context_length, c.window
        )
        init = nn.initializers.normal(c.init_std)
        tokens = Embedding(c.vocab_size, c.model_dim, c.vocab_pad_multiple, table_init=init, name="embed")
        x = first = self.execution.constrain(tokens(input_ids, self.execution.dtype), ("batch", "sequence", "embed"))
        shared = Shared(view(c.attention, inputs, x.dtype))
        stack = blocks(c.block, c.num_layers, self.execution, output_hidden_states, output_attentions, "decoder")
        x, outputs = stack(x, per_layer(cache), (shared,), train)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        head: Head | None = None
        if c.head == "lm" and c.tied:
            head = tokens.head()
        elif c.head == "lm":
            head = OutputLayer(c.vocab_size, c.vocab_pad_multiple, kernel_init=init, name="head")(x)
        out = frame.finish(x, first, outputs, head, inputs)
        return heads.on_decoder(self, out, input_ids, attention_mask, train, init)
