"""Measures loaded models: loss on a corpus, accuracy of a head with labels, probabilities of sentences and tokens."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from llm_jax.data import labeled, tokens
from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows
from llm_jax.data.tokenizers import Tokenizer, check_ids
from llm_jax.decoding import prefill, score
from llm_jax.decoding.finite import check_finite
from llm_jax.decoding.predict import kind_of
from llm_jax.interop import Pretrained
from llm_jax.objectives.labels import Labels
from llm_jax.training.rows import rows_of_model
from llm_jax.training.run import evaluate_rows
from llm_jax.training.step import make_eval_step


class SentenceScore(NamedTuple):
    """Probability of a text under a language model.

    Attributes:
      text: the text that was scored.
      log_probability: sum over its tokens, in nats.
      tokens: number of tokens that were scored.
      perplexity: per token.
    """

    text: str
    log_probability: float
    tokens: int
    perplexity: float


def evaluate_labels(
    loaded: Pretrained,
    tokenizer: Tokenizer,
    source: str,
    fields: Sequence[str],
    *,
    length: int = 512,
    batch_size: int = 4,
    limit: int = 0,
    layout: str | None = None,
    encoding: str | None = None,
) -> dict[str, float]:
    """Measures the loss and accuracy of a head with labels on labelled examples.

    Args:
      loaded: a model with a head for labels.
      tokenizer: the model's tokenizer.
      source: files of examples.
      fields: names of the examples' fields; see `data.labeled.read`.
      length: tokens per row; shortened to the model's context.
      batch_size: rows per batch.
      limit: number of batches; 0 takes all.
      layout: see `data.corpora.documents`.
      encoding: see `storage.text_files.check_encoding`.

    Returns:
      Metric name -> value.
    """
    kind, config = kind_of(loaded.config), loaded.config
    examples, _ = labeled.read(source, kind, fields, layout=layout, encoding=encoding)
    names = labeled.names_of(examples, kind, fields) if kind == "choice" else config.labels
    encoder = Encoder.of(config, tokenizer, kind, min(length, getattr(config, "context_length", 512)))
    rows, objective = LabeledRows(examples, encoder, names, source), Labels(kind)
    step = jax.jit(make_eval_step(loaded.model, objective))
    return evaluate_rows(objective, step, loaded.params, rows, batch_size, limit, dict)


def evaluate_text(
    loaded: Pretrained,
    tokenizer: Tokenizer,
    source: str,
    *,
    cache: epath.PathLike,
    length: int = 512,
    batch_size: int = 4,
    limit: int = 0,
    text_field: str = "text",
    layout: str | None = None,
    encoding: str | None = None,
) -> dict[str, float]:
    """Measures the loss and perplexity of a language model on a corpus.

    Args:
      loaded: a language model, not an encoder-decoder.
      tokenizer: the model's tokenizer.
      source: corpus, as `data.corpora.documents` reads it.
      cache: folder for the tokenized corpus.
      length: tokens per row; shortened to the model's context.
      batch_size: rows per batch.
      limit: number of batches; 0 takes all.
      text_field: field of records that holds the text.
      layout: see `data.corpora.documents`.
      encoding: see `storage.text_files.check_encoding`.

    Returns:
      Metric name -> value.

    Raises:
      ValueError: if the model's head predicts no tokens, or the tokenizer has ids that the model lacks.
    """
    config = loaded.config
    objective, rows_of = rows_of_model(config, tokenizer, min(length, getattr(config, "context_length", length)))
    framed = config.reads == "causal"
    store = tokens.build(
        source, tokenizer, cache, text_field=text_field, layout=layout, encoding=encoding, framed=framed
    )["train"]
    tokens.check_store(tokenizer, config.vocab_size, store)
    step = jax.jit(make_eval_step(loaded.model, objective))
    tokens_per_byte = len(store.ids) / store.text_bytes
    return evaluate_rows(objective, step, loaded.params, rows_of(store), batch_size, limit, dict, tokens_per_byte)


def score_sentence(loaded: Pretrained, tokenizer: Tokenizer, text: str) -> SentenceScore:
    """Scores a text; `SOURCE ||| TARGET` for an encoder-decoder.

    Raises:
      ValueError: if the text is empty or too long, or the perplexity is not finite.
    """
    logp_T = score.of_text(loaded.model, loaded.params, tokenizer, text)
    total = float(logp_T.sum())
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-total / len(logp_T)))
    check_finite(f"the perplexity of {text!r}", perplexity)
    return SentenceScore(text, total, len(logp_T), perplexity)


def next_tokens(
    loaded: Pretrained, tokenizer: Tokenizer, texts: Sequence[str], count: int = 10
) -> list[list[tuple[str, float]]]:
    """The most probable next tokens after each text.

    Args:
      loaded: a decoder.
      tokenizer: the model's tokenizer.
      texts: beginnings.
      count: tokens to return per text.

    Returns:
      (token, probability) per text, the most probable first.

    Raises:
      ValueError: if the model does not generate, or a text gives no token.
    """
    prefill.check_generates(loaded.model)
    call = functools.partial(loaded.model.apply, **prefill.order(loaded.model))
    logits = jax.jit(lambda params, ids, mask: call({"params": params}, ids, attention_mask=mask).logits)
    found = []
    for text in texts:
        ids = prefill.beginning(tokenizer) + tokenizer.encode(text)
        if not ids:
            raise ValueError("the text is empty and the tokenizer has no token for the beginning of text")
        check_ids(ids, loaded.config.vocab_size, tokenizer)
        ids_BT, mask_BT = prefill.padded(ids, loaded.config.context_length)
        p_V = np.asarray(jax.nn.softmax(logits(loaded.params, ids_BT, mask_BT)[0, len(ids) - 1]))
        check_finite(f"the probabilities after {text!r}", p_V)
        found.append([(tokenizer.decode([int(i)]), float(p_V[i])) for i in np.argsort(-p_V)[:count]])
    return found
