"""From prompts to a cache and the next token's logits, for decoders and encoder-decoders alike.

A decoder continues its prompt; an encoder-decoder reads it as the source, and its decoder begins with a start token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llm_jax.data.tokenizers import Tokenizer, check_ids
from llm_jax.models.shared import heads
from llm_jax.nn.cache import Cache
from llm_jax.nn.protocols import Model, Params

WRITES = ("causal", "any_order", "source")  # models that read like this (`config.reads`) write token by token


def is_encoder_decoder(model: Model) -> bool:
    """Whether the prompt is a source and not a beginning."""
    return model.config.reads == "source"


def check_generates(model: Model) -> None:
    """Refuses models without a decoder, or whose head predicts no tokens.

    Raises:
      ValueError: naming the model.
    """
    config = model.config
    if config.reads not in WRITES:
        raise ValueError(f"{type(model).__name__} sees both sides and cannot generate; see decoding.fill_mask")
    if not getattr(config, "decoder", True):
        raise ValueError(f"this {type(model).__name__} is an encoder alone and cannot generate")
    if getattr(config, "head", "lm") not in heads.LANGUAGE:
        raise ValueError(
            f"this {type(model).__name__} has head={config.head!r} and cannot generate: load it with head='lm'"
        )


def order(model: Model) -> dict[str, bool]:
    """Arguments of a call, beside the ids, with which each position predicts the next token."""
    return {"left_to_right": True} if model.config.reads == "any_order" else {}


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that a decoder reads before a text whose first token is predicted too.

    Training rows hold the same there: the begin token of the tokenizer's rule, or else the separator that ends the
    document before, or nothing.
    """
    if tokenizer.rule.begin:
        return list(tokenizer.rule.begin)
    return [] if tokenizer.separator is None else [tokenizer.separator]


def bucket(size: int, smallest: int = 16) -> int:
    """`size` rounded up to `smallest` times a power of two."""
    while smallest < size:
        smallest *= 2
    return smallest


def padded(ids: Sequence[int], longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One row `[1, T]` of ids and its mask, padded on the right to a bucket: texts of like lengths share a program.

    Args:
      ids: the row.
      longest: no padding goes past this length; None where there is no limit.
    """
    width = bucket(len(ids))
    width = max(len(ids), width if longest is None else min(width, longest))
    row, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
    row[0, : len(ids)], mask[0, : len(ids)] = ids, True
    return row, mask


class Layout(NamedTuple):
    """Prompts as arrays, padded to buckets: one compilation per bucket and not one per prompt length.

    Attributes:
      ids_BT: prompts, padded on the right.
      mask_BT: real tokens.
      slots: positions of the decoder's cache.
      new: room for generated tokens.
    """

    ids_BT: np.ndarray
    mask_BT: np.ndarray
    slots: int
    new: int


def lay_out(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    context_length: int,
    window: bool = False,
) -> Layout:
    """Checks the lengths and pads.

    Args:
      model: what will read them.
      prompts: token ids, one list a row, of any lengths.
      limits: tokens that each may generate.
      context_length: most tokens of prompt and output together; of an encoder-decoder most of source and output each.
      window: continue past the context with a sliding window (rotary models).

    Raises:
      ValueError: if a prompt is empty or holds an id outside of the vocabulary, or a row exceeds the context and
        `window` is off or the model has learned positions.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt is empty; give at least one token (the model's bos token will do)")
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} limits for {len(prompts)} prompts")
    check_ids(np.concatenate([np.asarray(p) for p in prompts]), model.config.vocab_size)
    longest = max(len(p) for p in prompts)
    if longest > context_length:
        raise ValueError(f"the prompt of {longest} tokens is longer than the context of {context_length}")
    has_source = is_encoder_decoder(model)
    if has_source:
        check_ids([model.config.start_id], model.config.vocab_size)
    total = max((1 if has_source else len(p)) + n for p, n in zip(prompts, limits, strict=True))
    if total > context_length and not window:
        what = "the start token and output" if has_source else "prompt and output"
        remedy = "lower max_new_tokens" + ("" if has_source else " or ask for a sliding window")
        raise ValueError(f"{what} of {total} tokens exceed the context of {context_length}: {remedy}")
    if total > context_length and not hasattr(model.config, "rope_theta"):
        raise ValueError(
            f"prompt and output of {total} tokens exceed the {context_length} learned positions of this "
            "model; a sliding window needs rotary positions"
        )
    width = min(bucket(longest), context_length)
    # the slots of an output alone are not a bucket: a beam search has them once a beam
    slots = min(-(-total // 8) * 8 if has_source else bucket(max(total, width)), context_length)
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    return Layout(ids, mask, slots, bucket(max(limits)))


def begin(
    model: Model, params: Params, ids_BT: jax.Array, mask_BT: jax.Array, slots: int, dtype: DTypeLike
) -> tuple[jax.Array, Cache]:
    """Reads the prompts into a fresh cache: logits `[B, V]` of the first token, and the cache."""
    cache = model.config.init_cache(ids_BT.shape[0], slots, dtype)
    if not is_encoder_decoder(model):
        return go_on(model, params, ids_BT, mask_BT, cache)
    start = jnp.full((ids_BT.shape[0], 1), model.config.start_id, jnp.int32)
    out = model.apply({"params": params}, ids_BT, start, attention_mask=mask_BT, cache=cache)
    return out.head.logits(out.head_input[:, 0]), out.cache


def go_on(model: Model, params: Params, ids_BT: jax.Array, mask_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits after each row's last real token, and the new cache."""
    if is_encoder_decoder(model):
        out = model.apply({"params": params}, None, ids_BT, decoder_attention_mask=mask_BT, cache=cache)
    else:
        out = model.apply({"params": params}, ids_BT, attention_mask=mask_BT, cache=cache)
    h = out.head_input
    if h.shape[1] > 1:
        return out.head.logits(heads.last_states(h, mask_BT)), out.cache
    return out.head.logits(h[:, 0]), out.cache


def prefix(model: Model, ids_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and mask of what stands before the output, for penalties.

    That is the prompt of a decoder, and the start token of an encoder-decoder.
    """
    if not is_encoder_decoder(model):
        return ids_BT, mask_BT
    start = jnp.full((ids_BT.shape[0], 1), model.config.start_id, jnp.int32)
    return start, jnp.ones_like(start, bool)


def entries(size: int, ids: Sequence[int]) -> np.ndarray:
    """`[size]` bool: True at the entries of a vocabulary that `ids` names."""
    return np.isin(np.arange(size), ids)


def ban(logits_BV: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Sets the logits of the entries `ids` to -inf."""
    return jnp.where(entries(logits_BV.shape[-1], ids), -jnp.inf, logits_BV) if ids else logits_BV
