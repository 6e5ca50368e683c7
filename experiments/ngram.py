"""N-gram language models of files with a sentence a line and blanks between words, `.gz` too.

A line is a sentence, whatever it holds: of text that is wrapped, as that of novels, the models are of lines.

python -m experiments.ngram train --order=5 --corpus='../shared/data/austen/*.txt.gz' --out=runs/austen.arpa
python -m experiments.ngram score --model=runs/austen.arpa --text=held_out.txt --json=runs/scores.json
python -m experiments.ngram next --model=runs/austen.arpa --after="it is a"
python -m experiments.ngram sample --model=runs/austen.arpa --count=5
"""

import gc
import glob
import os
import signal
import time
import warnings
from typing import Any, NoReturn

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from llm_jax.classic.ngrams import corpus, scoring, smoothing, stored
from llm_jax.classic.ngrams.ngram import BackoffModel, Model
from llm_jax.classic.text import sentences

CORPUS = flags.DEFINE_string("corpus", None, "Files to count in, a sentence a line; a pattern.")
HELD_OUT_HELP = (
    "Files for the weights of --smoothing=interpolated; a pattern. Without, the last tenth of the sentences."
)
HELD_OUT = flags.DEFINE_string("held_out", None, HELD_OUT_HELP)
ORDER = flags.DEFINE_integer("order", 3, "Words of the longest n-grams.", lower_bound=1)
SMOOTHING = flags.DEFINE_enum(
    "smoothing", "modified_kneser_ney", smoothing.METHODS, "See llm_jax/classic/ngrams/smoothing.py."
)
K = flags.DEFINE_float("k", 1.0, "With --smoothing=add_k: what every word has been seen more.")
BACKOFF = flags.DEFINE_float("backoff", 0.4, "With --smoothing=stupid_backoff: factor of a shorter history.")
MIN_COUNT = flags.DEFINE_integer("min_count", 1, "Words that occur less often are unknown.", lower_bound=1)
MAX_SIZE = flags.DEFINE_integer("max_vocabulary", None, "Number of words kept, the most frequent.", lower_bound=1)
VOCABULARY = flags.DEFINE_string("vocabulary", None, "File of words, one a line, instead of the corpus's.")
CLOSED = flags.DEFINE_bool("closed", False, "No word is ever unknown.")
SCRATCH = flags.DEFINE_string("scratch", None, "Count through files in this folder: beyond memory, resumable.")
WORKERS = flags.DEFINE_integer("workers", 1, "Processes that count, with --scratch.", lower_bound=1)
INVALID = flags.DEFINE_enum("invalid", "strict", sentences.POLICIES, "What happens to lines that are not UTF-8.")
OUT = flags.DEFINE_string("out", None, "ARPA file (.arpa, .lm, with .gz compressed), or a folder of arrays.")
MODEL = flags.DEFINE_string("model", None, "Model that train wrote, or any ARPA file.")
TEXT = flags.DEFINE_string("text", None, "Files to score, a sentence a line; a pattern.")
JSON_OUT = flags.DEFINE_string("json", None, "Write the numbers to this file.")
AFTER = cli.define_text("after", "Words of a sentence so far.")
TOP = flags.DEFINE_integer("top", 10, "Number of most probable next words.", lower_bound=1)
COUNT = flags.DEFINE_integer("count", 5, "Number of sentences.", lower_bound=1)
MAX_WORDS = flags.DEFINE_integer("max_words", 50, "Most words of a sentence.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the drawn sentences.")

SUMS = "scores that do not sum to one: a perplexity of them is not comparable with those of probabilities"

TRAINED = [CORPUS, HELD_OUT, ORDER, SMOOTHING, K, BACKOFF, MIN_COUNT, MAX_SIZE, VOCABULARY, CLOSED, SCRATCH, WORKERS]
COMMANDS: dict[str, list[flags.FlagHolder[Any]]] = {
    "train": [*TRAINED, INVALID, OUT],
    "score": [MODEL, TEXT, INVALID, JSON_OUT],
    "next": [MODEL, AFTER, TOP, JSON_OUT],
    "sample": [MODEL, AFTER, COUNT, MAX_WORDS, SEED],
}


def _shows() -> bool:
    """Whether somebody looks at bars."""
    return os.isatty(2)


def _check_output(*given: flags.FlagHolder[Any]) -> None:
    """Makes the folders of what will be written, or says now that it cannot be."""
    for flag in given:
        if not flag.value:
            continue
        path = os.path.abspath(flag.value)
        file = flag is not OUT or stored.is_arpa(path)
        try:
            os.makedirs(os.path.dirname(path) if file else path, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--{flag.name}={flag.value} cannot be written: {e}") from None
        if file and os.path.isdir(path):
            raise ValueError(f"--{flag.name}={flag.value} cannot be written: it is a folder")


def _terminated(*_: Any) -> NoReturn:
    raise KeyboardInterrupt("terminated")


def _reader(pattern: Any) -> sentences.Reader:
    found = sorted(glob.glob(pattern)) or [pattern]
    return sentences.Reader(found, INVALID.value)


def _say_invalid(reader: sentences.Reader | None) -> None:
    if reader is not None and reader.invalid:
        print(f"{reader.invalid:,} lines of {reader.paths[0]} and so on were no UTF-8 (--invalid={INVALID.value})")


def _check_training() -> None:
    """Refuses flags that are missing, or have no effect beside others."""
    cli.need(CORPUS, OUT)
    if SMOOTHING.value == "add_k" and stored.is_arpa(OUT.value):
        raise ValueError(
            "--smoothing=add_k makes no back-off table, so it fits no ARPA file: give --out a folder's name"
        )
    for flag, method in ((K, "add_k"), (BACKOFF, "stupid_backoff"), (HELD_OUT, "interpolated")):
        if flag.present and SMOOTHING.value != method:
            raise ValueError(f"--{flag.name} needs --smoothing={method}, not {SMOOTHING.value}")
    for threshold in (MIN_COUNT, MAX_SIZE):
        if threshold.present and VOCABULARY.value:
            raise ValueError(f"--{threshold.name} and --vocabulary exclude each other")
    if SCRATCH.value and SMOOTHING.value == "interpolated" and not HELD_OUT.value:
        raise ValueError("--smoothing=interpolated with --scratch needs --held_out")
    if WORKERS.present and not SCRATCH.value:
        raise ValueError("--workers count through files: set --scratch to a folder for them")
    _check_output(OUT)


def train() -> None:
    """Counts, smooths, writes."""
    _check_training()
    begin = time.perf_counter()
    vocabulary = sentences.read_vocabulary(VOCABULARY.value) if VOCABULARY.value else None
    reader, held_out = _reader(CORPUS.value), _reader(HELD_OUT.value) if HELD_OUT.value else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        counted = corpus.count_files(
            reader, ORDER.value, vocabulary=vocabulary, min_count=MIN_COUNT.value, max_size=MAX_SIZE.value,
            hold_out=held_out or SMOOTHING.value == "interpolated", closed=CLOSED.value, scratch=SCRATCH.value or None,
            workers=WORKERS.value, progress=_shows(), say=print,
        )  # fmt: skip
        with counted as found:
            for files in (reader, held_out):
                _say_invalid(files)
            if found.unknown == found.words:
                raise ValueError(f"none of the corpus's {found.words:,} words is in --vocabulary={VOCABULARY.value}")
            model = smoothing.estimate(
                found.counts, found.vocabulary, SMOOTHING.value, found.held_out, CLOSED.value, K.value, BACKOFF.value,
                _shows(),
            )  # fmt: skip
            if SMOOTHING.value == "stupid_backoff":
                print(f"warning: {SUMS}")
            for warning in said:
                print(f"warning: {warning.message}")
            part = f"{found.unknown:,} of them unknown ({found.unknown / found.words:.2%})"
            rate = found.words / (time.perf_counter() - begin)
            print(f"{found.words:,} words, {part}, {len(found.vocabulary):,} different, {rate:,.0f} a second")
            _save(model)


def _save(model: Model) -> None:
    stored.save(model, OUT.value, _shows())
    grams = sum(len(k) for k in model.keys)
    sizes = ", ".join(f"{len(k):,}" for k in model.keys)
    memory = f"{model.nbytes / grams:.1f} bytes each" if isinstance(model, BackoffModel) else "counts"
    print(f"{sizes} n-grams of 1 to {model.order} words ({memory}) in {OUT.value}")


def score(model: Model) -> None:
    """Log-probabilities of lines, perplexity of all."""
    cli.need(TEXT)
    _check_output(JSON_OUT)
    reader = _reader(TEXT.value)
    _, text = sentences.read(reader, vocabulary=model.vocabulary, keep_empty=True)
    _say_invalid(reader)
    begin = time.perf_counter()
    try:
        found = scoring.score_lines(model, text, _shows())
    except ValueError as e:
        raise ValueError(f"{TEXT.value}: {e}") from None
    rate = len(text) / (time.perf_counter() - begin)
    if not scoring.sums_to_one(model):
        print(f"warning: {SUMS}")
    if found.impossible:
        print(f"warning: {found.impossible:,} words or ends have no probability here, so the perplexity is infinite")
    print(
        f"perplexity {found.perplexity:.2f} ({found.perplexity_without_unknown:.2f} without unknown words), "
        f"{len(found.tokens):,} sentences, {found.tokens.sum():,} words, {found.unknown.sum():,} unknown, "
        f"{rate:,.0f} a second"
    )
    cli.write_json(JSON_OUT, found.to_dict())


def _after() -> list[str]:
    return [w.decode() for w in (AFTER.value or "").encode().split()]  # at ASCII blanks, as texts


def following(model: Model) -> None:
    """The most probable next words."""
    _check_output(JSON_OUT)
    found = scoring.most_probable(model, _after(), TOP.value)
    for word, probability in found:
        print(f"{probability:.5f} {word}")
    rows = [{"word": word, "probability": probability} for word, probability in found]
    cli.write_json(JSON_OUT, {"after": AFTER.value or "", "next": rows})


def sample(model: Model) -> None:
    """Sentences."""
    rng = np.random.default_rng(SEED.value)
    after = model.vocabulary.encode(_after())[:-1].tolist()
    for _ in tqdm(range(COUNT.value), unit="sentence", disable=COUNT.value < 20 or not _shows()):
        drawn = model.sample(rng, after, MAX_WORDS.value)
        print(" ".join([*_after(), *(model.vocabulary.words[w] for w in drawn)]))


def main(command: str) -> None:
    """Runs a command."""
    if command == "train":
        before = signal.signal(signal.SIGTERM, _terminated)  # as Ctrl-C
        gc.disable()  # what a signal raises within jax's callback of it is lost, and millions of words slow it down
        try:
            train()
        finally:
            gc.enable()
            signal.signal(signal.SIGTERM, before)
        return
    cli.need(MODEL)
    model = stored.load(MODEL.value, _shows())
    {"score": score, "next": following, "sample": sample}[command](model)


if __name__ == "__main__":
    cli.run(main, COMMANDS)
