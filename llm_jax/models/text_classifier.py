"""Word vectors under a BiLSTM or a CNN: text classification before pre-training.

Sources: Kim 2014 (CNN, max over time, 100 filters of each width, dropout 0.5, two channels, the norms of the
classifier's weights bounded), https://arxiv.org/abs/1408.5882; Graves and Schmidhuber 2005 (BiLSTM); Yang et al.
2016, equations 5 to 7 (attention pooling), https://aclanthology.org/N16-1174. Kim cuts the weights after every step;
here they are cut where the classifier multiplies by them, which gives the same functions. His bound of 3 is of weights
that he halves for use, and here dropout doubles what it keeps: it is 1.5.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.shared import frame
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import dropout
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.recurrent import Lstm, LstmState

KINDS = ("lstm", "cnn")
POOLINGS = ("attention", "max", "mean", "last")
PAD = 0  # row of the table that no word has; it is zero and stays so
GLOROT = nn.initializers.glorot_uniform()


@dataclasses.dataclass(frozen=True)
class TextClassifierConfig:
    """A classifier of texts whose tokens are words.

    Attributes:
      kind: `lstm` or `cnn`.
      vocab_size: V, rows of the table; row 0 is padding.
      model_dim: D, what the LSTM or the filters read of a word.
      embedding_dim: E, width of the table where a linear layer projects it to D; None reads its rows as they are.
      two_channels: a second table as wide is read beside the first, which is what training leaves as it is.
      hidden_dim: of kind `lstm`: H, width of the cells in each direction.
      num_layers: of kind `lstm`.
      pooling: of kind `lstm`: how the words' states become one: `attention`, `max`, `mean`, or `last`, the state of
        each direction when it has read all; a CNN takes the maximum.
      widths: of kind `cnn`: of the filters, words.
      filters: of kind `cnn`: as many of every width.
      input_dropout: rate on the words.
      dropout: rate before the classifier.
      max_norm: of the classifier's weights of each class, longer ones are cut to it; 0 never.
      labels: names of the classes.
    """

    kind: str = "lstm"
    vocab_size: int = 20000
    model_dim: int = 300
    embedding_dim: int | None = None
    two_channels: bool = False
    hidden_dim: int = 150
    num_layers: int = 1
    pooling: str = "attention"
    widths: tuple[int, ...] = (3, 4, 5)
    filters: int = 100
    input_dropout: float = 0.0
    dropout: float = 0.5
    max_norm: float = 0.0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    head: ClassVar[str] = "classification"
    reads: ClassVar[str] = "both_sides"

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        sizes = ("vocab_size", "model_dim", "hidden_dim", "num_layers", "filters")
        for name in (*sizes, *([] if self.embedding_dim is None else ["embedding_dim"])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.widths or min(self.widths) < 1 or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths={self.widths} must be whole numbers from 1, all different")
        for name in ("input_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.max_norm < math.inf:
            raise ValueError(f"max_norm={self.max_norm} must be a number from 0, which is no bound")
        if len(self.labels) < 2:
            raise ValueError(f"labels={self.labels} must name two classes or more")

    @property
    def num_labels(self) -> int:
        """C, number of classes."""
        return len(self.labels)

    def make(self, execution: Execution = Execution()) -> "TextClassifier":
        """Builds the model of this config."""
        return TextClassifier(self, execution)


def _table(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform in -0.25 to 0.25, as Kim draws the words that have no vector; padding is zero."""
    return jax.random.uniform(key, shape, dtype, -0.25, 0.25).at[PAD].set(0)


def _masked(x_BTD: jax.Array, real_BT: jax.Array, rest: float) -> jax.Array:
    return jnp.where(jnp.broadcast_to(real_BT[..., None], x_BTD.shape), x_BTD, rest)


class AttentionPooling(nn.Module):
    """The mean of states under softmax weights of `v . tanh(W h + b)`; of a row without words zeros."""

    @nn.compact
    def __call__(self, h_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(means `[B, D]`, weights `[B, T]`, which sum to one)."""
        width = h_BTD.shape[-1]
        u_BTD = jnp.tanh(Linear(width, ("embed", "mlp"), kernel_init=GLOROT, name="key")(h_BTD))
        score_BT1 = Linear(1, ("mlp", "heads"), use_bias=False, kernel_init=GLOROT, name="query")(u_BTD)
        w_BT = jax.nn.softmax(weights.wide(score_BT1[..., 0]), axis=-1, where=real_BT)
        w_BT = jnp.where(real_BT, w_BT, 0).astype(h_BTD.dtype)
        return jnp.einsum("btd,bt->bd", h_BTD, w_BT), w_BT


class BiLstm(nn.Module):
    """Layers of LSTMs in both directions, and what stands for the text."""

    config: TextClassifierConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(states `[B, T, 2 H]`, the text `[B, 2 H]`, weights `[B, T]` of attention pooling)."""
        c = self.config
        begin = LstmState.zeros(x_BTD.shape[0], c.hidden_dim, c.hidden_dim, x_BTD.dtype)
        for i in range(c.num_layers):
            layer = functools.partial(Lstm, c.hidden_dim, None, kernel_init=GLOROT)
            forward, last = layer(name=f"forward_{i}")(x_BTD, real_BT, begin)
            backward, first = layer(name=f"backward_{i}", reverse=True)(x_BTD, real_BT, begin)
            x_BTD = jnp.concatenate([forward, backward], axis=-1)
        if c.pooling == "attention":
            return x_BTD, *AttentionPooling(name="pool")(x_BTD, real_BT)
        if c.pooling == "last":
            return x_BTD, jnp.concatenate([last.output_BP, first.output_BP], axis=-1), None
        count_B1 = jnp.sum(real_BT, axis=1, keepdims=True)
        if c.pooling == "max":
            top_BD = jnp.max(_masked(x_BTD, real_BT, -jnp.inf), axis=1)
            return x_BTD, jnp.where(jnp.broadcast_to(count_B1 > 0, top_BD.shape), top_BD, 0), None
        mean_BD = jnp.sum(x_BTD, axis=1) / jnp.broadcast_to(jnp.maximum(count_B1, 1), x_BTD[:, 0].shape)
        return x_BTD, mean_BD, None  # the states behind a text are zero


class Convolutions(nn.Module):
    """Filters over every window that holds a word, and each one's maximum.

    Windows reach over both ends, where zeros stand, as in Kim's code; so the shortest text has one of every width.
    """

    config: TextClassifierConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
        """`[B, filters * len(widths)]`; `x_BTD` is zero where there is no word."""
        found = []
        for width in self.config.widths:
            ends = (width - 1, width - 1)
            x = jnp.pad(x_BTD, ((0, 0), ends, (0, 0)))
            real = jnp.pad(real_BT, ((0, 0), ends))
            length = x.shape[1] - width + 1
            windows = jnp.concatenate([x[:, i : i + length] for i in range(width)], axis=-1)
            holds = functools.reduce(jnp.logical_or, [real[:, i : i + length] for i in range(width)])
            filters = Linear(self.config.filters, ("embed", "mlp"), kernel_init=GLOROT, name=f"filters_{width}")
            found.append(jnp.max(_masked(jax.nn.relu(filters(windows)), holds, 0.0), axis=1))  # relu is never below 0
        return jnp.concatenate(found, axis=-1)


class Classifier(nn.Module):
    """A linear layer whose weights of each class have a norm of `max_norm` at most; 0 is no bound."""

    config: TextClassifierConfig

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Float32 logits `[B, C]`."""
        c, axes = self.config, ("embed", "labels")
        kernel_DC: Any = weights.parameter(self, "kernel", GLOROT, (x_BD.shape[-1], c.num_labels), axes)
        bias_C: Any = weights.parameter(self, "bias", nn.initializers.zeros, (c.num_labels,), axes[1:])
        if c.max_norm:
            kernel_DC = weights.dense(kernel_DC)
            square_1C = jnp.sum(jnp.square(kernel_DC), axis=0, keepdims=True)
            share_1C = c.max_norm * jax.lax.rsqrt(jnp.maximum(square_1C, c.max_norm**2))
            kernel_DC = kernel_DC * jnp.broadcast_to(share_1C, kernel_DC.shape)
        logits_BC = weights.matmul(x_BD, weights.cast(kernel_DC, x_BD.dtype))
        return weights.wide(weights.add_bias(logits_BC, bias_C))


class TextClassifier(nn.Module):
    """Classifies texts by an LSTM or a CNN over word vectors."""

    config: TextClassifierConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None, train: bool = False) -> Output:
        """Reads texts; words that `attention_mask` hides change nothing, wherever they stand.

        Args:
          input_ids: `[B, T]` words.
          attention_mask: `[B, T]`, 1 = word; by default those that are not 0.
          train: dropout, which needs a `dropout` key.

        Returns:
          `logits` float32 `[B, C]`; `pooler_output`, what stands for the text; of kind `lstm` also `last_hidden_state`
          `[B, T, 2 H]` and, of attention pooling, `attentions`, one `[B, 1, 1, T]`.

        Raises:
          ValueError: on ids that are no [B, T] integers, a mask of another shape, or a key that disagrees with
            `train`.
        """
        c, dtype = self.config, self.execution.dtype
        frame.check_call(self, input_ids, attention_mask, None, train)
        real = input_ids != PAD if attention_mask is None else attention_mask.astype(bool)
        width = c.model_dim if c.embedding_dim is None else c.embedding_dim
        names = ("embed", "embed_static")[: 1 + c.two_channels]
        read = [Embedding(c.vocab_size, width, table_init=_table, name=name)(input_ids, dtype) for name in names]
        x = jnp.concatenate(read, axis=-1)
        if c.embedding_dim is not None:
            x = Linear(c.model_dim, ("embed", "mlp"), kernel_init=GLOROT, name="embed_projection")(x)
        x = _masked(dropout(self, x, c.input_dropout, train), real, 0.0)
        x = self.execution.constrain(x, ("batch", "sequence", "embed"))
        if c.kind == "cnn":
            out = Output(pooler_output=Convolutions(c, name="cnn")(x, real))
        else:
            states, pooled, w_BT = BiLstm(c, name="lstm")(x, real)
            shown = None if w_BT is None else (w_BT[:, None, None],)
            out = Output(last_hidden_state=states, pooler_output=pooled, attentions=shown)
        text_BD: Any = out.pooler_output
        return out.replace(logits=Classifier(c, name="classifier")(dropout(self, text_BD, c.dropout, train)))
