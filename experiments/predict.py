r"""Predictions of a model with labels: classes, numbers, a tag a word, an answer, a choice.

    python -m experiments.predict --model=runs/sst2/merged --text="a stirring , funny film"
    python -m experiments.predict --model=runs/sick --text="A man sleeps" --text_pair="Nobody sleeps"
    python -m experiments.predict --model=runs/pos --text="They saw the saw ."
    python -m experiments.predict --model=FOLDER --question="Who slept ?" --context="Ann slept ."
    python -m experiments.predict --model=FOLDER --text="He opened the" --choice="door" --choice="rain"

Lines of --file (- for stdin) hold a text; a pair with a tab between; question and context with a tab between; or a text
and its choices with tabs between. Words to tag stand between blanks. Every line gives one line; an empty line gives an
empty one.
"""

import json
from typing import Any

from absl import flags

from experiments import cli

MODEL = cli.define_model()
AVERAGE = cli.define_average()
STREAM = cli.define_stream()
TEXTS = cli.define_texts("text", "A text, may be repeated.")
PAIRS = cli.define_texts("text_pair", "Second texts, one for every --text.")
QUESTION = cli.define_text("question", "A question about --context.")
CONTEXT = cli.define_text("context", "Where the answer stands.")
CHOICES = cli.define_texts("choice", "What may follow --text.")
FILE = flags.DEFINE_string("file", None, "Inputs, one a line; - reads stdin.")
ENCODING = cli.define_encoding()
JSON = flags.DEFINE_bool("json", False, "Print an object a line, with all probabilities.")
LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens a row at most; the model's context by default.")
BATCH = flags.DEFINE_integer("batch_size", 8, "Rows at once.", lower_bound=1)


def given() -> list[tuple[str, ...]]:
    """The inputs that the flags name, `()` for an empty line."""
    texts, pairs, choices = TEXTS.value, PAIRS.value, CHOICES.value
    question, context = QUESTION.value, CONTEXT.value
    ways = [bool(texts), question is not None or context is not None, FILE.value is not None]
    if sum(ways) != 1:
        raise ValueError("give one of --text, --question with --context, or --file")
    if not texts and (pairs or choices):
        raise ValueError("--text_pair and --choice belong to --text")
    if FILE.value is not None:
        read = cli.text_of(FILE.value, ENCODING.value).lines()
        lines = [tuple(line.split("\t")) if line.strip() else () for _, line in read]
        if not any(lines):
            raise ValueError(f"--file={FILE.value} holds no input")
        return lines
    if not texts:
        if question is None or context is None:
            raise ValueError("--question and --context need each other")
        return [(question, context)]
    if pairs and (choices or len(pairs) != len(texts)):
        raise ValueError(
            f"{len(texts)} --text, {len(pairs)} --text_pair and {len(choices)} --choice do not go together"
        )
    return [(a, b) for a, b in zip(texts, pairs, strict=True)] if pairs else [(text, *choices) for text in texts]


def line(answer: dict[str, Any], words: tuple[str, ...]) -> str:
    """An answer as text."""
    if "value" in answer:
        return f"{answer['value']:.4f}"
    if "tags" in answer:
        return " ".join(f"{w}/{tag or '?'}" for w, tag in zip(words, answer["tags"], strict=True))
    best = next(answer[k] for k in ("label", "choice", "answer") if k in answer)
    return f"{best}\t{answer['probability']:.4f}"


def main() -> None:
    """Loads, predicts, prints."""
    from llm_jax import interop
    from llm_jax.decoding import predict

    inputs = given()
    loaded = interop.load(cli.find_model(MODEL.value), dtype="float32", average=AVERAGE.value, stream=STREAM.value)
    if loaded.tokenizer is None:
        raise ValueError(f"{MODEL.value} holds no tokenizer")
    if predict.kind_of(loaded.config) == "tokens":
        inputs = [tuple(word for word in " ".join(x).split(" ") if word) for x in inputs]
    full = [x for x in inputs if x]
    answers = iter(predict.predict(loaded.model, loaded.params, loaded.tokenizer, full, LENGTH.value, BATCH.value))
    for words in inputs:
        answer = next(answers) if words else {}
        if JSON.value:
            print(json.dumps({"input": list(words), **answer}, allow_nan=False))
        else:
            print(line(answer, words) if words else "")


if __name__ == "__main__":
    cli.run(main)
