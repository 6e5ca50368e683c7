"""What every model returns."""

import jax
from flax import struct

from llm_jax.nn.cache import Cache
from llm_jax.nn.output import Head


class Output(struct.PyTreeNode):
    """Results of one forward pass; fields that a family lacks or that were not asked for are None.

    Attributes:
      logits: float32 `[B, T, V_padded]`; dead code under jit where only the loss is used.
      last_hidden_state: `[B, T, D]`.
      head: the output layer; losses use it with `last_hidden_state`, so that training never holds the logits.
      hidden_states: L + 1 arrays `[B, T, D]`: the embeddings, then every layer's output, the last one normalised.
      attentions: L arrays `[B, N, T, S]`.
      pooler_output: `[B, D]`, encoders only.
      cache: the updated cache.
    """

    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    head: Head | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    pooler_output: jax.Array | None = None
    cache: Cache | None = None
