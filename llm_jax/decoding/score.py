"""The probability of a text, under every family.

Decoders, and XLNet read from left to right, multiply the probabilities of next tokens; encoder-decoders do so for the
target, given its source. A masked model has a pseudo-log-likelihood: every token given all others. ELMo has a product
in each direction; a word counts the mean of both logarithms.

Source: Salazar et al. 2020 (pseudo-log-likelihood), https://arxiv.org/abs/1910.14659.
"""

import functools
from collections.abc import Sized

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.characters import character_ids
from llm_jax.data.tokenizers import Tokenizer, check_ids
from llm_jax.decoding import prefill
from llm_jax.decoding.fill_mask import pseudo_logprobs
from llm_jax.decoding.finite import check_finite
from llm_jax.models import parameters
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.weights import wide


def _logprobs(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Log-probability of each id under the logits at its position."""
    logp = jax.nn.log_softmax(wide(logits_BTV), axis=-1)
    return jnp.take_along_axis(logp, ids_BT[:, :, None], axis=-1)[:, :, 0]


@functools.partial(jax.jit, static_argnums=0)
def sequence_logprobs(model: Model, params: Params, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Log-probability of every token given those before it, `[B, T - 1]`, zero where the mask is off."""
    order = prefill.order(model)
    out = model.apply({"params": params}, ids_BT[:, :-1], attention_mask=mask_BT[:, :-1], **order)
    return jnp.where(mask_BT[:, 1:], _logprobs(out.logits, ids_BT[:, 1:]), 0.0)


@functools.partial(jax.jit, static_argnums=0)
def target_logprobs(model: Model, params: Params, source_BS: jax.Array, target_BT: jax.Array) -> jax.Array:
    """Log-probability of every token of a target given its source and those before it, `[B, T]`."""
    first = jnp.full_like(target_BT[:, :1], model.config.start_id)
    out = model.apply({"params": params}, source_BS, jnp.concatenate([first, target_BT[:, :-1]], axis=1))
    return _logprobs(out.logits, target_BT)


@functools.partial(jax.jit, static_argnums=0)
def both_ways_logprobs(model: Model, params: Params, ids_BT: jax.Array, characters_BTM: jax.Array) -> jax.Array:
    """ELMo's log-probability of each word but the ends, the mean of both directions, `[B, T - 2]`."""
    out = model.apply({"params": params}, characters_BTM)
    forward, backward = jnp.split(out.last_hidden_state, 2, axis=-1)
    words_BT = ids_BT[:, 1:-1]
    after = _logprobs(out.head.logits(forward[:, :-2]), words_BT)
    before = _logprobs(out.head.logits(backward[:, 2:]), words_BT)
    return (after + before) / 2


def of_text(model: Model, params: Params, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Log-probabilities of a text's tokens, `[P]`; their sum is the text's.

    A decoder reads what training rows hold before a text (`prefill.beginning`). Tokens that the tokenizer's rule
    appends to a text count as part of it.

    Args:
      model: any with a language-model head.
      params: the model's parameters.
      tokenizer: the model's tokenizer.
      text: for an encoder-decoder `SOURCE ||| TARGET`.

    Raises:
      ValueError: if the text has no token to score, the model has no such head, a token has no row in its table, or a
        log-probability is not finite.
    """
    out = _of_text(model, params, tokenizer, text)
    check_finite(f"the log-probabilities of {text!r}", out)
    return out


def _of_text(model: Model, params: Params, tokenizer: Tokenizer, text: str) -> np.ndarray:
    config = model.config
    parameters.check(model, params)
    params = realize(params)
    if config.reads in prefill.WRITES:
        prefill.check_generates(model)
    if config.reads == "source":
        source, bar, target = text.partition("|||")
        if not bar or not source.strip() or not target.strip():
            raise ValueError(f"{text!r} is not of the form 'SOURCE ||| TARGET', which an encoder-decoder scores")
        source_ids = tokenizer.encode_source(source.strip())
        target_ids = tokenizer.target.encode_source(target.strip())
        check_ids([*source_ids, *target_ids], config.vocab_size, tokenizer)
        return np.asarray(target_logprobs(model, params, np.asarray([source_ids]), np.asarray([target_ids])))[0]
    if config.reads == "characters":
        if not config.vocab_size or tokenizer.separator is None:
            raise ValueError("this ELMo has no output layer (vocab_size=0) or its tokenizer no end of text")
        words = tokenizer.encode(text)
        _check_length(words, text)
        ids = [tokenizer.separator, *words, tokenizer.separator]
        check_ids(ids, config.vocab_size, tokenizer)
        spelled = np.stack([character_ids(tokenizer.token(i), config.max_characters) for i in ids])
        return np.asarray(both_ways_logprobs(model, params, np.asarray([ids]), spelled[None]))[0]
    if config.reads != "both_sides":
        end = tokenizer.rule.end if config.reads == "causal" else ()  # XLNet's frame texts that are labelled
        ids = [*prefill.beginning(tokenizer), *tokenizer.encode(text), *end]
        _check_length(ids, text, least=2)
        check_ids(ids, config.vocab_size, tokenizer)
        ids_BT, mask_BT = prefill.padded(ids, config.context_length + 1)
        return np.asarray(sequence_logprobs(model, params, ids_BT, mask_BT))[0, : len(ids) - 1]
    mask = tokenizer.role("mask")
    if mask is None:
        raise ValueError("the tokenizer has no mask token")
    framed = tokenizer.batch([text])["input_ids"][0]
    check_ids(framed, config.vocab_size, tokenizer)
    positions = np.flatnonzero(~tokenizer.is_special()[framed])
    _check_length(positions, text)
    return pseudo_logprobs(model, params, framed, positions, mask)


def _check_length(ids: Sized, text: str, least: int = 1) -> None:
    if len(ids) < least:
        raise ValueError(f"{text!r} has too few tokens to say anything about; give a longer text")
