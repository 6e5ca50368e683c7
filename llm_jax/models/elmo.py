"""ELMo: a character CNN under two LSTM language models, one in each direction, whose layers are mixed.

Sources: Peters et al. 2018, https://arxiv.org/abs/1802.05365; Kim et al. 2016 (characters),
https://arxiv.org/abs/1508.06615; Jozefowicz et al. 2016 (its sizes), https://arxiv.org/abs/1602.02410.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from llm_jax.models.shared import heads
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attention import dropout
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.output import OutputLayer
from llm_jax.nn.recurrent import Highway, Lstm, LstmState
from llm_jax.nn.stack import Stack

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
DIRECTIONS = ("forward", "backward")
HEADS = ("none", "classification", "tokens")


@dataclasses.dataclass(frozen=True)
class ElmoConfig:
    """A bidirectional language model. The defaults are the original's `5.5B`.

    Attributes:
      vocab_size: V, words of the output layer; 0 leaves it away (features only).
      num_characters: rows of the character table; 0 is not a token.
      max_characters: M, of a word.
      character_dim: of the table.
      widths: of the filters, characters.
      filters: as many of each width.
      num_highways: layers between filters and projection.
      activation: of the filters.
      model_dim: P, of a word and of each direction's outputs.
      hidden_dim: H, of the cells.
      num_layers: in each direction.
      residual: a layer's input is added to its output, but for the first.
      cell_clip: bound on the cells, None for none.
      projection_clip: bound on the outputs, None for none.
      dropout: rate on the inputs of every layer and on the last outputs.
      vocab_pad_multiple: output columns are padded to this multiple.
      head: `none` (language model or features), `classification` (of the mean of the words' mixes) or `tokens` (of
        every word's mix).
      labels: names of the classes; one class is regression.
      head_dropout: rate on what the classifier reads.
      mix_norm: the layers are normalised before they are mixed (see `ScalarMix`).
    """

    vocab_size: int = 0
    num_characters: int = 262
    max_characters: int = 50
    character_dim: int = 16
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    filters: tuple[int, ...] = (32, 32, 64, 128, 256, 512, 1024)
    num_highways: int = 2
    activation: str = "relu"
    model_dim: int = 512
    hidden_dim: int = 4096
    num_layers: int = 2
    residual: bool = True
    cell_clip: float | None = 3.0
    projection_clip: float | None = 3.0
    dropout: float = 0.1
    vocab_pad_multiple: int = 1
    head: str = "none"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head_dropout: float = 0.5
    mix_norm: bool = False

    reads: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        """Checks sizes and names."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is not one of {', '.join(HEADS)}")
        if self.head != "none" and self.vocab_size:
            raise ValueError(f"head={self.head!r} takes the place of the words' output layer: set vocab_size=0")
        if len(self.widths) != len(self.filters) or not self.widths:
            raise ValueError(f"widths={self.widths} and filters={self.filters} must name as many")
        if max(self.widths) > self.max_characters:
            raise ValueError(f"widths={self.widths} exceed max_characters={self.max_characters}")

    @property
    def num_labels(self) -> int:
        """Number of classes of the head."""
        return len(self.labels)

    def make(self, execution: Execution = Execution()) -> "Elmo":
        """Builds the model of this config."""
        return Elmo(self, execution)

    def init_carry(self, batch: int, dtype: Any = "float32") -> "ElmoState":
        """States at the beginning of a text."""
        zeros = functools.partial(LstmState.zeros, batch, self.hidden_dim, self.model_dim, jnp.dtype(dtype))
        forward, backward = (tuple(zeros() for _ in range(self.num_layers)) for _ in DIRECTIONS)
        return ElmoState(forward, backward)


class ElmoState(struct.PyTreeNode):
    """States carried from sentence to sentence: those of each direction, one a layer."""

    forward: tuple[LstmState, ...]
    backward: tuple[LstmState, ...]


def _characters(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal rows; that of id 0, which no word has and the original's files leave out, is zero and stays so."""
    return jax.random.normal(key, shape, dtype).at[0].set(0)


class _Words(nn.Module):
    """Maps character ids to word vectors."""

    config: ElmoConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids_BTM: jax.Array) -> jax.Array:
        """Maps character ids to word vectors `[B, T, P]`."""
        c, init = self.config, nn.initializers.lecun_normal()
        table = Embedding(
            c.num_characters,
            c.character_dim,
            vocab_axis=None,
            table_init=_characters,
            name="characters",
        )
        x_BTMC = table(ids_BTM, self.dtype)
        found = []
        for i, (width, count) in enumerate(zip(c.widths, c.filters, strict=True)):
            length = ids_BTM.shape[-1] - width + 1
            windows = jnp.concatenate([x_BTMC[:, :, j : j + length] for j in range(width)], axis=-1)
            filters = Linear(count, ("embed", "mlp"), kernel_init=init, name=f"filters_{i}")
            found.append(ACTIVATIONS[c.activation](jnp.max(filters(windows), axis=2)))
        x = jnp.concatenate(found, axis=-1)
        for i in range(c.num_highways):
            x = Highway(init, name=f"highway_{i}")(x)
        return Linear(c.model_dim, ("mlp", "embed"), kernel_init=init, name="projection")(x)


class _Layer(nn.Module):
    """One LSTM of one direction; `per_layer` is its state and whether its input is added."""

    config: ElmoConfig
    reverse: bool

    @nn.compact
    def __call__(self, x, per_layer, real, train=False):
        state, adds = per_layer
        c = self.config
        lstm = Lstm(
            hidden=c.hidden_dim,
            features=c.model_dim,
            cell_clip=c.cell_clip,
            projection_clip=c.projection_clip,
            reverse=self.reverse,
            kernel_init=nn.initializers.lecun_normal(),
            name="lstm",
        )
        y, state = lstm(dropout(self, x, c.dropout, train), real, state)
        y = y + x * adds.astype(x.dtype)
        return y, (y, state)


class Elmo(nn.Module):
    """A bidirectional language model over words spelled in characters."""

    config: ElmoConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        cache: ElmoState | None = None,
        train: bool = False,
    ) -> Output:
        """Reads sentences.

        Args:
          input_ids: `[B, T, M]` character ids (`data.characters`); while parameters are initialised also `[B, T]`.
          attention_mask: `[B, T]`, 1 = real token; by default those with any id above 0.
          cache: the states that run on from the sentences before, zeros by default.
          train: dropout, which needs a `dropout` key.

        Returns:
          `hidden_states`: the words twice, then every layer, forward and backward side by side, `[B, T, 2 P]`;
          `head_input` is the last of them; `cache` the states after the last tokens read. With a head of labels
          `last_hidden_state` is the mix, `pooler_output` its mean over the words between the ends of a sentence.

        Raises:
          ValueError: on ids that are no [B, T, M] integers, a mask of another shape, or a key that disagrees with
            `train`.
        """
        c = self.config
        if self.is_initializing() and input_ids.ndim == 2:
            input_ids = jnp.broadcast_to(input_ids[..., None], (*input_ids.shape, c.max_characters))
        if input_ids.ndim != 3 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids must be [B, T, M] integers, got {input_ids.dtype}{list(input_ids.shape)}")
        b, t, m = input_ids.shape
        if m != c.max_characters:
            raise ValueError(f"words have {m} characters, the config asks for max_characters={c.max_characters}")
        if attention_mask is not None and attention_mask.shape != (b, t):
            raise ValueError(f"attention_mask must be [B, T] like the words [{b}, {t}], got {attention_mask.shape}")
        if train != self.has_rng("dropout"):
            raise ValueError('train=True needs a dropout key (rngs={"dropout": key}), and train=False takes none')
        real = jnp.any(input_ids > 0, axis=-1) if attention_mask is None else attention_mask.astype(bool)
        words = _Words(c, self.execution.dtype, name="words")(input_ids)
        words = self.execution.constrain(words, ("batch", "sequence", "embed"))
        states = c.init_carry(b, words.dtype) if cache is None else cache
        adds = [jnp.float32(c.residual and i > 0) for i in range(c.num_layers)]
        outputs, ends = [], []
        for name, before in zip(DIRECTIONS, (states.forward, states.backward), strict=True):
            block = functools.partial(_Layer, c, name == "backward")
            stack = Stack(block, c.num_layers, None, self.execution, name=name)
            _, found = stack(words, tuple(zip(before, adds, strict=True)), (real,), train)
            outputs.append([y for y, _ in found])
            ends.append(tuple(state for _, state in found))
        hidden = [jnp.concatenate(pair, axis=-1) for pair in zip(*outputs, strict=True)]
        last = dropout(self, hidden[-1], c.dropout, train)
        head = None
        if c.vocab_size:
            layer = OutputLayer(c.vocab_size, c.vocab_pad_multiple, True, nn.initializers.lecun_normal(), name="head")
            head = layer(words)
        out = Output(
            last_hidden_state=last,
            head=head,
            hidden_states=(jnp.concatenate([words, words], axis=-1), *hidden),
            cache=ElmoState(*ends),
        )
        return out if c.head == "none" else self._labels(out, real, train)

    def _labels(self, out: Output, real: jax.Array, train: bool) -> Output:
        c = self.config
        mix = ScalarMix(c.num_layers + 1, c.mix_norm, name="mix")(out.hidden_states or (), real)
        edge = jnp.zeros_like(real[:, :1])
        inner = real & jnp.concatenate([edge, real[:, :-1]], axis=1) & jnp.concatenate([real[:, 1:], edge], axis=1)
        w_BT1 = inner.astype(mix.dtype)[..., None]
        mean = jnp.sum(mix * w_BT1, axis=1) / jnp.maximum(jnp.sum(w_BT1, axis=1), 1)
        out = out.replace(last_hidden_state=mix, pooler_output=mean)
        init = nn.initializers.normal(0.02)
        return out.replace(logits=heads.label_logits(self, out, c.head_dropout, train, init))


class ScalarMix(nn.Module):
    """ELMo's vector of a word for one task: gamma times the mean of the layers under softmax weights.

    Attributes:
      num_layers: of what is mixed, the word layer included.
      layer_norm: layers are first normalised, each over all its real words and features together, as the original's.
    """

    num_layers: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, hidden_states: tuple[jax.Array, ...], attention_mask_BT: Any = None) -> jax.Array:
        """`[B, T, D]` from as many arrays of that shape.

        Raises:
          ValueError: if there are more or fewer layers.
        """
        if len(hidden_states) != self.num_layers:
            raise ValueError(f"{len(hidden_states)} layers for a mix of {self.num_layers}")
        scores = weights.parameter(self, "weights", nn.initializers.zeros, (self.num_layers,), ("norm",))
        gamma = weights.parameter(self, "gamma", nn.initializers.ones, (1,), ("norm",))
        layers = jnp.stack(hidden_states)
        if self.layer_norm:
            mask = jnp.ones(layers.shape[1:3]) if attention_mask_BT is None else jnp.asarray(attention_mask_BT)
            mask = mask.astype(layers.dtype)[None, :, :, None]
            count = jnp.sum(mask) * layers.shape[-1]
            mean = jnp.sum(layers * mask, axis=(1, 2, 3), keepdims=True) / count
            spread = jnp.sum(jnp.square(layers * mask - mean) * mask, axis=(1, 2, 3), keepdims=True) / count
            layers = (layers - mean) * jax.lax.rsqrt(spread + 1e-12)
        return gamma[0] * jnp.tensordot(jax.nn.softmax(scores), layers, axes=1)
