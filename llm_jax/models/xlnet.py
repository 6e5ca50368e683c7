"""XLNet: an autoregressive model over any order of the tokens, with memories of the text before.

Source: Yang et al. 2019, https://arxiv.org/abs/1906.08237, as transformers' `modeling_xlnet.py` reads its checkpoints;
but a position that may see nothing sees nothing here, where theirs sees everything alike.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Initializer

from llm_jax.models.shared import frame, heads
from llm_jax.models.shared.block import BlockConfig, Shared, blocks, per_layer
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import AttentionConfig, dropout
from llm_jax.nn.cache import Cache, LayerCache, init_cache
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.output import padded_size
from llm_jax.nn.relations import Order, to_cache, within_text
from llm_jax.nn.two_stream import PlacedCache, TwoStreamAttention

HEADS = ("none", "lm", "classification", "tokens", "span", "choice")


@dataclasses.dataclass(frozen=True)
class XLNetConfig:
    """An XLNet. The defaults are the base model's.

    Attributes:
      vocab_size: V.
      context_length: longest row in training and generation, tokens; positions have no end.
      model_dim: D.
      num_layers: L.
      num_heads: N.
      hidden_dim: F.
      activation: of the feed-forward.
      norm_eps: of the layer norms.
      dropout: one rate for embeddings, positions, weights and residual branches.
      memory_length: M, hidden states of the text before that each layer keeps; 0 for none.
      reuse_length: of a row's states only so many, from its beginning, enter the memory; None for all.
      clamp_length: longer distances count as this one; None for none.
      causal_mask: a position sees none behind it (`attn_type="uni"`), beside what `perm_mask` says.
      same_length: with `causal_mask`, every position sees as many keys.
      head: `none`, `lm`, `classification`, `tokens`, `span` or `choice`.
      labels: names of the classes (classification, tokens).
      head_dropout: rate before a classifier.
      init_std: of all matrices.
      vocab_pad_multiple: token rows are padded to this multiple.
    """

    vocab_size: int = 32000
    context_length: int = 512
    model_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    memory_length: int = 0
    reuse_length: int | None = None
    clamp_length: int | None = None
    causal_mask: bool = False
    same_length: bool = False
    head: str = "lm"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head_dropout: float = 0.1
    init_std: float = 0.02
    vocab_pad_multiple: int = 1

    reads: ClassVar[str] = "any_order"  # and so from left to right, where a call asks for it
    pads_left: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        heads.check(self.head, HEADS)
        if self.memory_length < 0 or (self.reuse_length is not None and self.reuse_length < 1):
            raise ValueError(
                f"memory_length={self.memory_length} and reuse_length={self.reuse_length} must be positive"
            )
        _ = self.block

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    @property
    def block(self) -> BlockConfig:
        """The layers, with attention of two streams and the norm after each sum."""
        return BlockConfig(
            attention=AttentionConfig.with_biases(self.model_dim, self.num_heads, self.dropout, self.init_std),
            attention_layer=TwoStreamAttention,
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            norm="post",
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            activation_dropout=self.dropout,
        )

    def make(self, execution: Execution = Execution()) -> "XLNet":
        """Builds the model of this config."""
        return XLNet(self, execution)

    def init_cache(self, batch: int, size: int, dtype: Any = "float32") -> "Reading":
        """An empty cache for reading and writing from left to right."""
        plain = init_cache(self.num_layers, batch, size, self.num_heads, self.block.attention.head_dim, dtype)
        return Reading(tuple(PlacedCache(layer) for layer in plain.layers), plain.length_B)  # type: ignore[arg-type]

    def init_carry(self, batch: int, dtype: Any = "float32") -> "Memories":
        """Empty memories of `memory_length` states a layer."""
        shape = (batch, self.memory_length, self.model_dim)
        layers = tuple(jnp.zeros(shape, dtype) for _ in range(self.num_layers))
        return Memories(layers, jnp.zeros((batch,), jnp.int32))


class Memories(struct.PyTreeNode):
    """Hidden states of the text before, the newest last; passed in, returned, never differentiated.

    Attributes:
      layers: `[B, M, D]`, one a layer.
      length_B: how many of the last are filled.
    """

    layers: tuple[jax.Array, ...]
    length_B: jax.Array


class Reading(Cache):
    """Cache of decoding from left to right."""

    layers: tuple[PlacedCache, ...]  # type: ignore[assignment]

    @property
    def content(self) -> tuple[LayerCache, ...]:
        """Keys and values, one entry a layer."""
        return tuple(layer.content for layer in self.layers)

    def with_content(self, content: tuple[LayerCache, ...]) -> "Reading":
        """This cache with other keys and values."""
        return self.replace(layers=tuple(a.replace(content=b) for a, b in zip(self.layers, content, strict=True)))


class XLNet(nn.Module):
    """XLNet: two streams over a text and its memory."""

    config: XLNetConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        perm_mask: jax.Array | None = None,
        target_mapping: jax.Array | None = None,
        target_positions: jax.Array | None = None,
        left_to_right: bool = False,
        backwards: jax.Array | None = None,
        cache: Memories | Reading | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Reads rows of text, and predicts at targets where there are any.

        Args:
          input_ids: `[B, T]`; with the `choice` head `[B, choices, T]`, masks and types alike.
          attention_mask: `[B, T]`, 1 = real token.
          token_type_ids: `[B, T]`, any numbers: attention knows whether two tokens agree.
          perm_mask: `[B, T, T]`, 1 = position i may not see position j.
          target_mapping: `[B, K, T]`, one-hot: positions to predict, as in transformers.
          target_positions: `[B, K]`, the same as numbers.
          left_to_right: reads as a decoder does: position i sees those up to itself and predicts position i + 1.
          backwards: `[B]`, 1 = the row's text is reversed (half of pre-training's rows); None where none is.
          cache: memories of the text before (`init_carry`), or of a text read from left to right (`init_cache`).
          train: dropout.
          output_hidden_states: returns the content stream of every layer.
          output_attentions: returns its weights.

        Returns:
          `last_hidden_state` is the query stream `[B, K, D]` where there are targets (`[B, T, D]` from left to right),
          else the content stream.

        Raises:
          ValueError: see `frame.check_call`; also on masks of other shapes, and on orders, types or directions of a
            text that is read from left to right.
        """
        c = self.config
        rows = input_ids.shape[:-1]
        if c.head == "choice":
            flat: Any = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
            input_ids, attention_mask, token_type_ids = flat(input_ids), flat(attention_mask), flat(token_type_ids)
        frame.check_call(self, input_ids, attention_mask, None, train)
        b, t = input_ids.shape
        reading = cache if isinstance(cache, Reading) else None
        memory = cache if isinstance(cache, Memories) and c.memory_length else None
        left_to_right |= reading is not None
        if left_to_right and (c.head != "lm" or c.same_length):
            raise ValueError("an XLNet reads from left to right with head='lm' and same_length=False only")
        order = read_order(
            (b, t),
            left_to_right,
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            target_positions=target_positions,
            token_type_ids=token_type_ids,
            backwards=backwards,
        )
        if reading is not None:
            inputs = frame.read_inputs(input_ids, attention_mask, None, None, reading, c.context_length)
            targets, slots = order.targets_BK, inputs.slots_BT
            relations = to_cache(inputs.mask, slots, targets, reading.size, c.model_dim, c.clamp_length)
        else:
            relations = within_text(
                (b, t),
                order,
                c.model_dim,
                attention_mask,
                clamp=c.clamp_length,
                causal=c.causal_mask,
                same_length=c.same_length,
                memory_length=0 if memory is None else c.memory_length,
                filled_B=None if memory is None else memory.length_B,
            )

        def drop(x: jax.Array) -> jax.Array:
            return dropout(self, x, c.dropout, train)

        init = nn.initializers.normal(c.init_std)
        tokens = Embedding(c.vocab_size, c.model_dim, c.vocab_pad_multiple, table_init=init, name="embed")
        h = first = self.execution.constrain(
            drop(tokens(input_ids, self.execution.dtype)), ("batch", "sequence", "embed")
        )
        query = weights.parameter(self, "query", init, (c.model_dim,), ("embed",))
        g = None
        if order.targets_BK is not None:
            g = drop(jnp.broadcast_to(query.astype(h.dtype), (*order.targets_BK.shape, c.model_dim)))
        relations = relations.replace(encodings_GPD=drop(relations.encodings_GPD.astype(h.dtype)))
        memories = cache if isinstance(cache, Memories) else None
        stack = blocks(
            c.block,
            c.num_layers,
            self.execution,
            output_hidden_states or memories is not None,
            output_attentions,
            "encoder",
        )
        before = per_layer(reading) if memory is None else tuple((states, None) for states in memory.layers)
        (h, g), outputs = stack((h, g), before, (Shared(relations),), train)
        caches, hidden, shown, _ = zip(*outputs, strict=True)
        if memories is not None:
            cache = self._remember(memories, (first, *hidden[:-1]))
        elif reading is not None:
            cache = inputs.remember(tuple(layer for layer, _ in caches))
        out = Output(
            last_hidden_state=drop(h if g is None else g),
            hidden_states=(first, *hidden) if output_hidden_states else None,
            attentions=shown if output_attentions else None,
            cache=cache,
        )
        return self._head(out, tokens, rows, attention_mask, train, init)

    def _remember(self, cache: Memories, states: tuple[jax.Array, ...]) -> Memories:
        """The memories with what entered the layers behind them."""
        c = self.config
        if c.memory_length == 0:
            return cache
        count = states[0].shape[1] if c.reuse_length is None else min(c.reuse_length, states[0].shape[1])

        def join(old: jax.Array, new: jax.Array) -> jax.Array:
            longer = jnp.concatenate([old, new[:, :count].astype(old.dtype)], axis=1)
            return jax.lax.stop_gradient(longer[:, -c.memory_length :])

        layers = tuple(join(old, new) for old, new in zip(cache.layers, states, strict=True))
        return Memories(layers, jnp.minimum(cache.length_B + count, c.memory_length))

    def _head(
        self,
        out: Output,
        tokens: Embedding,
        rows: tuple[int, ...],
        attention_mask: jax.Array | None,
        train: bool,
        init: Initializer,
    ) -> Output:
        c = self.config
        x: Any = out.last_hidden_state
        if c.head == "none":
            return out
        if c.head == "lm":
            size = (padded_size(c.vocab_size, c.vocab_pad_multiple),)
            bias = weights.parameter(self, "logits_bias", nn.initializers.zeros, size, ("vocab",))
            head = tokens.head(bias)
            return out.replace(logits=head.logits(x), head=head)
        if c.head in heads.POOLED:  # the last position, since XLNet pads on the left
            pooled = jnp.tanh(Linear(c.model_dim, ("embed", "embed"), kernel_init=init, name="pooler")(x[:, -1]))
            out = out.replace(pooler_output=pooled)
        rate = 0.0 if c.head in ("span", "tokens") else c.head_dropout
        logits = heads.label_logits(self, out, rate, train, init, attention_mask)
        return out.replace(logits=logits.reshape(rows) if c.head == "choice" else logits)


def read_order(
    shape: tuple[int, int],
    left_to_right: bool,
    perm_mask: jax.Array | None,
    target_mapping: jax.Array | None,
    target_positions: jax.Array | None,
    token_type_ids: jax.Array | None,
    backwards: jax.Array | None,
) -> Order:
    """The order that a call's arguments ask for, of rows `[B, T]`; see `XLNet`.

    Raises:
      ValueError: on arguments of other shapes, or any beside `left_to_right`.
    """
    b, t = shape
    orders = (perm_mask, target_mapping, target_positions, token_type_ids, backwards)
    if left_to_right and any(x is not None for x in orders):
        raise ValueError(
            "left_to_right is an order of its own: no perm_mask, targets, token_type_ids or backwards with it"
        )
    if perm_mask is not None and perm_mask.shape != (b, t, t):
        raise ValueError(f"perm_mask must be [{b}, {t}, {t}], got {list(perm_mask.shape)}")
    if target_mapping is not None:
        if target_mapping.ndim != 3 or (target_mapping.shape[0], target_mapping.shape[2]) != (b, t):
            raise ValueError(f"target_mapping must be [{b}, K, {t}], got {list(target_mapping.shape)}")
        target_positions = jnp.argmax(target_mapping, axis=-1).astype(jnp.int32)
    if backwards is not None and backwards.shape != (b,):
        raise ValueError(f"backwards must be [{b}], one flag a row, got {list(backwards.shape)}")
    if left_to_right:
        target_positions = jnp.broadcast_to(jnp.arange(1, t + 1, dtype=jnp.int32), (b, t))
    return Order(
        perm_mask=perm_mask,
        targets_BK=target_positions,
        types_BT=None if token_type_ids is None else jnp.asarray(token_type_ids, jnp.int32),
        backwards_B=None if backwards is None else backwards.astype(bool),
        left_to_right=left_to_right,
    )
