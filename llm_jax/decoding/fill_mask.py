"""Masked language models: fillings of masks, and a pseudo-likelihood of a whole text.

Source: Salazar et al. 2020 (pseudo-log-likelihood), https://arxiv.org/abs/1910.14659.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.tokenizers import check_ids
from llm_jax.decoding import prefill
from llm_jax.models import parameters
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.weights import wide

ROWS = 16  # texts with one mask each that go through the model at once


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(model: Model, params: Params, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    out = model.apply({"params": params}, ids_BT, mask_BT)
    return jax.nn.log_softmax(wide(out.logits), axis=-1)


def fill(model: Model, params: Params, ids_BT: np.ndarray, attention_mask_BT: np.ndarray) -> np.ndarray:
    """Log-probabilities `[B, T, V]` of every entry at every position; those at mask tokens are the fillings."""
    _check(model)
    parameters.check(model, params)
    params = realize(params)
    check_ids(ids_BT, model.config.vocab_size)
    return np.asarray(_log_softmax(model, params, jnp.asarray(ids_BT), jnp.asarray(attention_mask_BT)))


def pseudo_logprobs(model: Model, params: Params, ids: np.ndarray, positions: np.ndarray, mask_id: int) -> np.ndarray:
    """Log-probability of each token at `positions` given all the others; their sum is the pseudo-log-likelihood.

    Args:
      model: an encoder with a masked-LM head.
      params: its parameters.
      ids: `[T]`, one text with its special tokens.
      positions: `[P]`, which tokens are predicted (usually all but the special ones).
      mask_id: the mask token.

    Returns:
      `[P]` float32.

    Raises:
      ValueError: if the model has no masked-LM head.
    """
    _check(model)
    params = realize(params)
    check_ids([*np.asarray(ids), mask_id], model.config.vocab_size)
    out, (padded, mask) = [], prefill.padded(ids.tolist(), model.config.context_length)
    mask = np.repeat(mask, ROWS, axis=0)
    for start in range(0, len(positions), ROWS):
        masked = positions[start : start + ROWS]
        rows = np.repeat(padded, ROWS, axis=0)
        rows[np.arange(len(masked)), masked] = mask_id
        logp = _log_softmax(model, params, jnp.asarray(rows), jnp.asarray(mask))
        out.append(np.asarray(logp)[np.arange(len(masked)), masked, ids[masked]])
    return np.concatenate(out) if out else np.zeros(0, np.float32)


def _check(model: Model) -> None:
    if getattr(model.config, "head", None) not in ("masked_lm", "pretraining"):
        raise ValueError(
            f"{type(model).__name__} has no masked-LM head here: load a ...ForMaskedLM or ...ForPreTraining"
        )
