"""Encoder and decoder joined by cross-attention: what the 2017 Transformer, Marian and T5 share.

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.models.shared import frame
from llm_jax.models.shared.block import BlockConfig, Shared, blocks, per_layer, view
from llm_jax.models.shared.output import Output
from llm_jax.nn import weights
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import View, dropout
from llm_jax.nn.cache import Cache
from llm_jax.nn.execution import Execution
from llm_jax.nn.output import Head


class Arguments(NamedTuple):
    """The arguments of a call.

    Attributes:
      input_ids: `[B, S]`, the source; None where the cache has read it.
      decoder_input_ids: `[B, T]`, what the decoder has written, its start token first; None for the encoder alone.
      attention_mask: `[B, S]`, 1 = real token.
      decoder_attention_mask: `[B, T]`.
      cache: what was decoded before.
      train: dropout.
      output_hidden_states: returns every layer's output.
      output_attentions: returns the attention weights.
    """

    input_ids: jax.Array | None
    decoder_input_ids: jax.Array | None = None
    attention_mask: jax.Array | None = None
    decoder_attention_mask: jax.Array | None = None
    cache: Cache | None = None
    train: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False


@dataclasses.dataclass(frozen=True)
class Parts:
    """What tells a family of encoder-decoders from the others.

    Attributes:
      encoder: its blocks.
      decoder: its blocks.
      embed: `ids -> x`, before positions and dropout.
      dropout: rate on embeddings with their positions.
      end: `(x, stack's name) -> x`, behind the last block.
      head: `x -> Head or None` of the decoder's last state.
      context_length: longest row that `embed` takes, None without a limit.
      decodes: False for an encoder alone.
    """

    encoder: tuple[BlockConfig, int]
    decoder: tuple[BlockConfig, int]
    embed: Callable[[jax.Array], jax.Array]
    dropout: float
    end: Callable[[jax.Array, str], jax.Array]
    head: Callable[[jax.Array], Head | None]
    context_length: int | None
    decodes: bool = True


def run(module: Any, call: Arguments, parts: Parts) -> Output:
    """One forward pass.

    Args:
      module: the calling Linen module; its parameters `encoder` and `decoder` are the two stacks.
      call: its arguments. While parameters are initialised the source also stands for the decoder's input.
      parts: what the family computes around the two stacks.

    Returns:
      The decoder's `Output`, with the encoder's in `encoder`; without decoder input the encoder's alone.

    Raises:
      ValueError: if the source is missing or given again, or see `frame.check_call` and `frame.read_inputs`.
    """
    ids, cache, train = call.input_ids, call.cache, call.train
    read = cache is not None and cache.cross is not None
    if ids is None and not read:
        raise ValueError("input_ids=None needs a cache that has read a source; pass the source with the first call")
    if ids is not None and read:
        raise ValueError("this cache has read its source: pass input_ids=None with the next tokens")
    target = call.decoder_input_ids
    if target is None and parts.decodes and module.is_initializing():
        target = ids
    shown = (call.output_hidden_states, call.output_attentions)

    def enter(ids: jax.Array, inputs: frame.Inputs, block: BlockConfig) -> tuple[jax.Array, Execution]:
        """What enters the first block, and an execution that names the dtype in which its sublayers compute.

        The sums of a wide block are in float32 in float16, from the first on where no norm follows them.
        """
        positions = block.attention.positions
        x = positions.embed(block.attention, parts.embed(ids), inputs.positions_BT, module.execution.dtype)
        x = dropout(module, x, parts.dropout, train)
        x = module.execution.constrain(x, ("batch", "sequence", "embed"))
        wide = weights.wide_half(x, block.wide and block.norm == "pre")
        return x.astype(wide), dataclasses.replace(module.execution, dtype=x.dtype)

    encoded, source, real = None, None, None
    if ids is not None:
        frame.check_call(module, ids, call.attention_mask, None, train)
        inputs = frame.read_inputs(ids, call.attention_mask, None, None, None, parts.context_length, causal=False)
        x, execution = enter(ids, inputs, parts.encoder[0])
        first = x
        shared = Shared(view(parts.encoder[0].attention, inputs, x.dtype))
        x, outputs = blocks(*parts.encoder, execution, *shown, "encoder")(x, None, (shared,), train)
        source = parts.end(x, "encoder").astype(execution.dtype)
        encoded = frame.finish(source, first, outputs, None, inputs)
        real = jnp.ones(ids.shape, bool) if call.attention_mask is None else call.attention_mask.astype(bool)
    elif cache is not None:
        real = cache.source_BS
    if target is None:
        if encoded is None or cache is not None:
            raise ValueError("decoder_input_ids are missing: pass the start token at least")
        return encoded
    assert real is not None

    frame.check_call(module, target, call.decoder_attention_mask, None, train)
    if target.shape[0] % real.shape[0]:
        raise ValueError(f"{target.shape[0]} rows of decoder_input_ids for {real.shape[0]} of input_ids")
    inputs = frame.read_inputs(target, call.decoder_attention_mask, None, None, cache, parts.context_length)
    y, execution = enter(target, inputs, parts.decoder[0])
    first = y
    queries = jnp.zeros((real.shape[0], target.shape[0] // real.shape[0] * target.shape[1]), jnp.int32)
    source_mask = Mask(queries, jnp.where(real, 0, -1), causal=False)
    seen = view(parts.decoder[0].attention, inputs, y.dtype)
    shared = Shared(seen, View(source_mask, source_BSD=source))
    y, outputs = blocks(*parts.decoder, execution, *shown, "decoder")(y, per_layer(cache), (shared,), train)
    y = parts.end(y, "decoder").astype(execution.dtype)
    out = frame.finish(y, first, outputs, parts.head(y), inputs)
    caches, _, _, looks = zip(*outputs, strict=True)
    if out.cache is not None:
        cross = tuple(c for _, c in caches)
        dtype = out.cache.layers[0].k_BKSH.dtype
        cross = jax.tree.map(lambda x: x.astype(dtype), cross)
        out = out.replace(cache=out.cache.replace(cross=cross, source_BS=real))
    return out.replace(cross_attentions=None if looks[0] is None else looks, encoder=encoded)
