"""N-gram language models of files with a sentence a line and blanks between words, `.gz` too.

A line is a sentence, whatever it holds: of text that is wrapped, as that of novels, the models are of lines.

python -m experiments.ngram train --order=5 --corpus='../shared/data/austen/*.txt.gz' --out=runs/austen.arpa
python -m experiments.ngram score --model=runs/austen.arpa --text=held_out.txt --json=runs/scores.json
python -m experiments.ngram next --model=runs/austen.arpa --after="it is a"
python -m experiments.ngram sample --model=runs/austen.arpa --count=5
"""

import contextlib
import gc
import glob
import json
import os
import signal
import time
import warnings
from typing import Any, NoReturn

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from llm_jax.classic.ngrams import counting, hashed, smoothing, stored, streaming
from llm_jax.classic.ngrams import held_out as tenth
from llm_jax.classic.ngrams.ngram import BackoffModel, Model
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import BEGIN, END, UNKNOWN

CORPUS = flags.DEFINE_string("corpus", None, "Files to count in, a sentence a line; a pattern.")
HELD_OUT_HELP = (
    "Files for the weights of --smoothing=interpolated; a pattern. Without, the last tenth of the sentences."
)
HELD_OUT = flags.DEFINE_string("held_out", None, HELD_OUT_HELP)
ORDER = flags.DEFINE_integer("order", 3, "Words of the longest n-grams.", lower_bound=1)
SMOOTHING = flags.DEFINE_enum(
    "smoothing", "modified_kneser_ney", smoothing.METHODS, "See llm_jax/classic/ngrams/smoothing.py."
)
K = flags.DEFINE_float("k", 1.0, "Of --smoothing=add_k.")
BACKOFF = flags.DEFINE_float("backoff", 0.4, "Of --smoothing=stupid_backoff.")
MIN_COUNT = flags.DEFINE_integer("min_count", 1, "Rarer words are unknown.", lower_bound=1)
MAX_SIZE = flags.DEFINE_integer("max_vocabulary", None, "Keep so many words, the most frequent.", lower_bound=1)
VOCABULARY = flags.DEFINE_string("vocabulary", None, "File of words, one a line, in the place of the corpus's own.")
CLOSED = flags.DEFINE_bool("closed", False, "Nothing is ever unknown.")
SCRATCH = flags.DEFINE_string("scratch", None, "Count through files in this folder: beyond memory, resumable.")
WORKERS = flags.DEFINE_integer("workers", 1, "Processes that count, with --scratch.", lower_bound=1)
INVALID = flags.DEFINE_enum("invalid", "strict", sentences.POLICIES, "What becomes of lines that are no UTF-8.")
OUT = flags.DEFINE_string("out", None, "ARPA file (.arpa, .lm, with .gz compressed), or a folder of arrays.")
MODEL = flags.DEFINE_string("model", None, "What train wrote, or any ARPA file.")
TEXT = flags.DEFINE_string("text", None, "Files to score, a sentence a line; a pattern.")
JSON_OUT = flags.DEFINE_string("json", None, "Write the numbers to this file.")
AFTER = cli.define_text("after", "Words of a sentence so far.")
TOP = flags.DEFINE_integer("top", 10, "How many of the most probable next words.", lower_bound=1)
COUNT = flags.DEFINE_integer("count", 5, "How many sentences.", lower_bound=1)
MAX_WORDS = flags.DEFINE_integer("max_words", 50, "Of a sentence.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")

SUMS = "scores that do not sum to one: a perplexity of them is not comparable with those of probabilities"

COMMANDS: dict[str, list[flags.FlagHolder[Any]]] = {
    "train": [
        *(CORPUS, HELD_OUT, ORDER, SMOOTHING, K, BACKOFF, MIN_COUNT, MAX_SIZE, VOCABULARY, CLOSED, SCRATCH, WORKERS),
        *(INVALID, OUT),
    ],
    "score": [MODEL, TEXT, INVALID, JSON_OUT],
    "next": [MODEL, AFTER, TOP, JSON_OUT],
    "sample": [MODEL, AFTER, COUNT, MAX_WORDS, SEED],
}


def _need(*wanted: flags.FlagHolder[Any]) -> None:
    for flag in wanted:
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing")


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


def _say_invalid(reader: sentences.Reader) -> None:
    if reader.invalid:
        print(f"{reader.invalid:,} lines of {reader.paths[0]} and so on were no UTF-8 (--invalid={INVALID.value})")


def train() -> None:
    """Counts, smooths, writes."""
    _need(CORPUS, OUT)
    if SMOOTHING.value == "add_k" and stored.is_arpa(OUT.value):
        raise ValueError("--smoothing=add_k is no table of back-offs, as an ARPA file is: give --out a folder's name")
    for flag, method in ((K, "add_k"), (BACKOFF, "stupid_backoff"), (HELD_OUT, "interpolated")):
        if flag.present and SMOOTHING.value != method:
            raise ValueError(f"--{flag.name} is of --smoothing={method}, not of {SMOOTHING.value}")
    for threshold in (MIN_COUNT, MAX_SIZE):
        if threshold.present and VOCABULARY.value:
            raise ValueError(f"--{threshold.name} and --vocabulary exclude each other")
    if SCRATCH.value and SMOOTHING.value == "interpolated" and not HELD_OUT.value:
        raise ValueError("--smoothing=interpolated with --scratch needs --held_out")
    if WORKERS.present and not SCRATCH.value:
        raise ValueError("--workers count through files: set --scratch to a folder for them")
    _check_output(OUT)
    begin = time.perf_counter()
    given = sentences.read_vocabulary(VOCABULARY.value) if VOCABULARY.value else None
    reader = _reader(CORPUS.value)
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        vocabulary, counts, held_out = _count(reader, given, stack)
        _say_invalid(reader)
        words, unknown = (int(x) for x in (counts.counts[0].sum() - counts.counts[0][END], counts.counts[0][UNKNOWN]))
        if unknown == words:
            raise ValueError(f"none of the corpus's {words:,} words is in --vocabulary={VOCABULARY.value}")
        model = smoothing.estimate(
            *(counts, vocabulary, SMOOTHING.value, held_out, CLOSED.value, K.value, BACKOFF.value, _shows())
        )
        if SMOOTHING.value == "stupid_backoff":
            print(f"warning: {SUMS}")
        for warning in said:
            print(f"warning: {warning.message}")
        seconds = time.perf_counter() - begin
        part = f"{unknown:,} of them unknown ({unknown / words:.2%})"
        print(f"{words:,} words, {part}, {len(vocabulary):,} different, {words / seconds:,.0f} a second")
        _save(model)


def _count(
    reader: sentences.Reader, given: sentences.Vocabulary | None, stack: contextlib.ExitStack
) -> tuple[sentences.Vocabulary, counting.Counts, np.ndarray | None]:
    """(vocabulary, counts, held-out sentences if any), in memory or through files that go with `stack`."""
    thresholds = dict(min_count=MIN_COUNT.value, max_size=MAX_SIZE.value)
    options: dict[str, Any] = {"vocabulary": given} if given else thresholds
    if SCRATCH.value:
        folder = stack.enter_context(streaming.resumable(SCRATCH.value, reader, **options))
        if os.path.exists(os.path.join(folder, streaming.WRITTEN)):
            print(f"going on with what is in {folder}")
        vocabulary, ends = streaming.write_text(reader, folder, **options)
        counts = streaming.count(folder, len(vocabulary), ORDER.value, ends, WORKERS.value, _shows())
        return vocabulary, counts, _held_out(vocabulary)
    vocabulary, text = sentences.read(reader, **options)
    held_out = _held_out(vocabulary)
    if held_out is None and SMOOTHING.value == "interpolated":
        cut, lines = tenth.last_tenth(text)
        if not CLOSED.value and given is None:
            vocabulary, text = tenth.known_before(vocabulary, text, cut, MIN_COUNT.value)
        text, held_out = text[:cut], text[cut:]
        words = len(held_out) - 2 * lines
        print(f"the last {lines:,} sentences, {words:,} words, set the weights and are not counted")
    return vocabulary, counting.count(text, len(vocabulary), ORDER.value, _shows()), held_out


def _held_out(vocabulary: sentences.Vocabulary) -> np.ndarray | None:
    if not HELD_OUT.value:
        return None
    reader = _reader(HELD_OUT.value)
    text = sentences.read(reader, vocabulary=vocabulary)[1]
    _say_invalid(reader)
    return text


def _save(model: Model) -> None:
    stored.save(model, OUT.value, _shows())
    grams = sum(len(k) for k in model.keys)
    sizes = ", ".join(f"{len(k):,}" for k in model.keys)
    memory = f"{model.nbytes / grams:.1f} bytes each" if isinstance(model, BackoffModel) else "counts"
    print(f"{sizes} n-grams of 1 to {model.order} words ({memory}) in {OUT.value}")


def score(model: Model) -> None:
    """Log-probabilities of lines, perplexity of all."""
    _need(TEXT)
    _check_output(JSON_OUT)
    reader = _reader(TEXT.value)
    _, text = sentences.read(reader, vocabulary=model.vocabulary, keep_empty=True)
    _say_invalid(reader)
    begin = time.perf_counter()
    log_p = hashed.score(model, text, _shows())
    seconds = time.perf_counter() - begin
    begins = np.flatnonzero(text == BEGIN)
    sums = lambda x: np.add.reduceat(x, begins) if len(begins) else np.zeros(0)
    totals, tokens = sums(log_p), sums(np.ones(len(text))) - 2
    unknown = sums((text == UNKNOWN).astype(float))
    ends, words = len(begins), int(tokens.sum())
    if not ends:
        raise ValueError(f"{TEXT.value}: no line")
    known = log_p[(text != UNKNOWN) & (text != BEGIN)]
    perplexity, of_known = 10 ** (-totals.sum() / (words + ends)), 10 ** (-known.mean())
    finite = lambda x: float(x) if np.isfinite(x) else None  # JSON has no infinity
    results = {
        "perplexity": finite(perplexity),
        "perplexity_without_unknown": finite(of_known),
        "log10_probability": finite(totals.sum()),
        "sentences": ends,
        "tokens": words,
        "unknown": int(unknown.sum()),
        "lines": [
            {"log10_probability": finite(p), "tokens": int(t), "unknown": int(u)}
            for p, t, u in zip(totals, tokens, unknown, strict=True)
        ],
    }
    if abs(model.next([BEGIN]).sum() - 1) > 1e-3:
        print(f"warning: {SUMS}")
    if never := int(np.isneginf(log_p).sum()):
        print(f"warning: {never:,} words or ends have no probability here, so the perplexity is infinite")
    print(
        f"perplexity {perplexity:.2f} ({of_known:.2f} without unknown words), "
        f"{ends:,} sentences, {words:,} words, {results['unknown']:,} unknown, {len(text) / seconds:,.0f} a second"
    )
    if JSON_OUT.value:
        with open(JSON_OUT.value, "w") as f:
            json.dump(results, f)


def _after() -> list[str]:
    return [w.decode() for w in (AFTER.value or "").encode().split()]  # at ASCII blanks, as texts


def following(model: Model) -> None:
    """The most probable next words."""
    _check_output(JSON_OUT)
    p = model.next(model.vocabulary.encode(_after())[:-1].tolist())
    best = np.argsort(-p, kind="stable")[: TOP.value]
    found = [{"word": model.vocabulary.words[i], "probability": float(p[i])} for i in best]
    found = [row for row in found if row["probability"] > 0]
    for row in found:
        print(f"{row['probability']:.5f} {row['word']}")
    if JSON_OUT.value:
        with open(JSON_OUT.value, "w") as f:
            json.dump({"after": AFTER.value or "", "next": found}, f)


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
    _need(MODEL)
    model = stored.load(MODEL.value, _shows())
    {"score": score, "next": following, "sample": sample}[command](model)


if __name__ == "__main__":
    cli.run(main, COMMANDS)
