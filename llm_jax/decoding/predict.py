"""Predictions of heads with labels: classes with probabilities, numbers, a tag a word, an answer, a choice."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.data.rows.labeled_rows import Encoder, Pieces
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.decoding.finite import check_finite
from llm_jax.decoding.prefill import bucket
from llm_jax.models import parameters
from llm_jax.nn import weights
from llm_jax.nn.protocols import Batch, Model, Params
from llm_jax.nn.realized import realize

INPUTS = {"classification": (1, 2), "span": (2,), "choice": range(3, 100)}
LONGEST = 30  # tokens of an answer, as in Devlin et al. 2019's code


def kind_of(config: Any) -> str:
    """The kind of labels that a model's head gives; one class is a number.

    Raises:
      ValueError: if it has no such head.
    """
    head = getattr(config, "head", "none")
    if head not in (*INPUTS, "tokens"):
        raise ValueError(f"the model has head={head!r} and no labels: fine-tune it with objective Labels")
    return "regression" if head == "classification" and config.num_labels == 1 else head


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, batch: Batch) -> jax.Array:
    return weights.wide(model.apply({"params": params}, **batch).logits)


def predict(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    inputs: Sequence[tuple[str, ...]],
    length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Answers in the order of the inputs, JSON-ready; rows and batches are padded to powers of two, compiled once each.

    Args:
      model: a model whose head has labels.
      params: the model's parameters.
      tokenizer: the model's tokenizer.
      inputs: a text or a pair of them each; words (`tokens`); question and context (`span`); a text and its choices.
      length: tokens a row at most; what is longer is cut. The model's context by default, and at most 512.
      batch_size: rows at once.

    Returns:
      `{"label", "probability", "probabilities": {label: p}}` (classification; several classes of one text share 1),
      `{"value"}` (regression), `{"tags", "probabilities"}`, one each a word, None where the word was cut (tokens),
      `{"answer", "start", "probability"}`, an empty answer at start None where the first token is best (span), or
      `{"choice", "probability", "probabilities"}` (choice).

    Raises:
      ValueError: if the model has no labels, an input is not of its kind or too long, a token has no row in the model's
        table, or a number is not finite.
    """
    config, kind = model.config, kind_of(model.config)
    parameters.check(model, params)
    params = realize(params)
    head = "classification" if kind == "regression" else kind
    for texts in inputs:
        fits = head == "tokens" or (len(texts) in INPUTS[head] and len(texts) == len(inputs[0]))
        if not texts or not fits or not all(map(str.strip, texts)):
            raise ValueError(f"a model with head={head!r} cannot read {texts!r}")
    if not inputs:
        return []
    batch_size = min(batch_size, bucket(len(inputs), 1))
    encoder = Encoder.of(config, tokenizer, kind, min(length or 512, getattr(config, "context_length", 512)))
    encoded = encoder(inputs)
    for texts, pieces in zip(inputs, encoded, strict=True):
        if not pieces or not all(len(p.ids) for p in pieces):
            raise ValueError(f"{texts[0]!r} has no token, or leaves its context no room in {encoder.length}")
    out: list[dict[str, Any]] = []
    for start in range(0, len(inputs), batch_size):
        chunk = encoded[start : start + batch_size]
        size = min(bucket(max(len(p.ids) for pieces in chunk for p in pieces)), encoder.length)
        rows = [encoder.row(pieces, size) for pieces in chunk]
        rows += rows[:1] * (batch_size - len(rows))
        logits = np.asarray(_logits(model, params, {k: np.stack([r[k] for r in rows]) for k in rows[0]}))
        check_finite("the labels' logits", logits[: len(chunk)])
        for texts, pieces, row in zip(inputs[start:], chunk, logits, strict=False):
            row = row[encoder.shift(pieces[0], size) :] if head in ("tokens", "span") else row
            out.append(_answer_of(config.labels, kind, texts, pieces[0], row))
    return out


def _log_softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    x = logits - logits.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def _answer_of(
    labels: Sequence[str], kind: str, texts: tuple[str, ...], pieces: Pieces, logits: np.ndarray
) -> dict[str, Any]:
    if kind == "regression":
        return {"value": float(logits[0])}
    if kind == "span":
        return _answer(texts[1], pieces, _log_softmax(logits, axis=0))
    p = np.exp(_log_softmax(logits))
    if kind == "tokens":
        found = [(None, None) if i is None else (labels[p[i].argmax()], float(p[i].max())) for i in pieces.places]
        return {"tags": [tag for tag, _ in found], "probabilities": [q for _, q in found]}
    names = texts[1:] if kind == "choice" else labels
    return {
        "choice" if kind == "choice" else "label": names[p.argmax()],
        "probability": float(p.max()),
        "probabilities": dict(zip(names, map(float, p), strict=True)),
    }


def _answer(context: str, pieces: Pieces, logp_T2: np.ndarray) -> dict[str, Any]:
    """The best stretch of the context, or nothing where the first token is better."""
    inside_T = np.array([place is not None for place in pieces.places])
    first_T, last_T = np.where(inside_T[:, None], logp_T2[: len(inside_T)], -np.inf).T
    ends = np.pad(last_T, (0, LONGEST - 1), constant_values=-np.inf)
    scores = first_T[:, None] + np.lib.stride_tricks.sliding_window_view(ends, LONGEST)  # [first, last - first]
    first, more = np.unravel_index(scores.argmax(), scores.shape)
    best, nothing = scores[first, more], logp_T2[0].sum()
    if not inside_T[0] and nothing >= best:
        return {"answer": "", "start": None, "probability": float(np.exp(nothing))}
    probability = float(np.exp(best))
    begin, end = pieces.places[first][0], pieces.places[first + more][1]
    answer = context[begin:end]
    return {"answer": answer.strip(), "start": begin + len(answer) - len(answer.lstrip()), "probability": probability}
