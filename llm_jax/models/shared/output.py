"""The output type of every model."""

from typing import Any

import jax
from flax import struct

from llm_jax.nn.output import Head


class Output(struct.PyTreeNode):
    """Results of one forward pass; fields that a family lacks or that were not asked for are None.

    Attributes:
      logits: float32. `[B, T, V_padded]` of language models (dead code under jit where only the loss is used);
        `[B, labels]`, `[B, T, labels]`, `[B, T, 2]` (starts, ends) or `[B, choices]` of the other heads.
      last_hidden_state: `[B, T, D]`.
      head: the output layer; losses use it with `head_input`, so that training never holds the logits.
      head_input_BTE: what `head` multiplies; None where that is `last_hidden_state`.
      hidden_states: L + 1 arrays `[B, T, D]`: the embeddings, then every layer's output, the last one normalised.
      attentions: L arrays `[B, N, T, S]`.
      pooler_output: `[B, D]`, what stands for a row: encoders, and decoders with classes.
      pair_logits: float32 `[B, 2]` of next-sentence or sentence-order prediction.
      cache: the updated cache, of the type that the config's `init_cache` or `init_carry` returns.
      cross_attentions: L arrays `[B, N, T, S]` of an encoder-decoder, S positions of the source.
      encoder: what its encoder returned.
    """

    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    head: Head | None = None
    head_input_BTE: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    pooler_output: jax.Array | None = None
    pair_logits: jax.Array | None = None
    cache: Any = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder: "Output | None" = None

    @property
    def head_input(self) -> jax.Array | None:
        """Input of `head`, `[B, T, E]`."""
        return self.last_hidden_state if self.head_input_BTE is None else self.head_input_BTE
