"""Word vectors of files with a sentence a line and blanks between words, `.gz` too.

python -m experiments.word2vec train --corpus='texts/*.txt' --architecture=skip_gram --loss=negative_sampling --size=100
    --window=5 --min_count=5 --epochs=3 --seed=1 --out=runs/vectors.txt
python -m experiments.word2vec evaluate --vectors=runs/vectors.txt --json=runs/quality.json
python -m experiments.word2vec nearest --vectors=runs/vectors.txt --word=money
python -m experiments.word2vec analogy --vectors=runs/vectors.txt --words=man,king,woman
python -m experiments.word2vec plot --vectors=runs/vectors.txt --words=man,woman,king,queen --out=runs/plot.png

Training writes checkpoints into a folder beside the vectors (or --workdir), and the same command resumes from there.
"""

import glob
import json
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from experiments import cli
from llm_jax.classic.text import sentences
from llm_jax.classic.vectors import evaluation, noise, plots, word2vec
from llm_jax.classic.vectors.word2vec import Word2VecConfig
from llm_jax.classic.vectors.word_vectors import METHODS, WordVectors
from llm_jax.interop.word_vectors import files
from llm_jax.tasks import word2vec_run

DEFAULT = Word2VecConfig()
CORPUS: flags.FlagHolder[Any] = flags.DEFINE_string("corpus", None, "Files to learn from; a pattern.")
INVALID = flags.DEFINE_enum(
    "invalid", "strict", sentences.POLICIES, "What happens to lines, or words, that are not UTF-8."
)
MIN_COUNT = flags.DEFINE_integer("min_count", 5, "Words that occur less often are left out.", lower_bound=1)
MAX_SIZE = flags.DEFINE_integer("max_vocabulary", None, "Number of words kept, the most frequent.", lower_bound=2)
MODEL: list[flags.FlagHolder[Any]] = [
    flags.DEFINE_enum(
        "architecture", DEFAULT.architecture, word2vec.ARCHITECTURES, "See llm_jax/classic/vectors/word2vec.py."
    ),
    flags.DEFINE_enum("loss", DEFAULT.loss, word2vec.LOSSES, "See llm_jax/classic/vectors/word2vec.py."),
    flags.DEFINE_integer("size", DEFAULT.size, "Width of the vectors."),
    flags.DEFINE_integer("window", DEFAULT.window, "Words on either side, at most."),
    flags.DEFINE_bool("dynamic", DEFAULT.dynamic, "Draw each window from 1 to --window."),
    flags.DEFINE_integer("negatives", DEFAULT.negatives, "Negative words a pair, of negative sampling."),
    flags.DEFINE_integer("shared", DEFAULT.shared, "Words drawn for 32 centres, of negative and sampled; 0 chooses."),
    flags.DEFINE_float("exponent", DEFAULT.exponent, "Power of the counts by which words are drawn."),
    flags.DEFINE_float("sample", DEFAULT.sample, "Frequency above which words are left out at random; 0 keeps all."),
    flags.DEFINE_enum("subsampling", DEFAULT.subsampling, noise.FORMULAS, "Formula of --sample."),
    flags.DEFINE_integer("block", DEFAULT.block, "Words whose gradient is taken at once; a GPU wants about 1,024."),
    flags.DEFINE_integer("blocks", DEFAULT.blocks, "Blocks a step."),
]
EPOCHS = flags.DEFINE_integer("epochs", 5, "Passes over the corpus.")
RATE = flags.DEFINE_float("learning_rate", 0.025, "First learning rate; it falls linearly.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of everything that is drawn.", lower_bound=0)
WORKDIR: flags.FlagHolder[Any] = flags.DEFINE_string("workdir", None, "Folder of the run; OUT.run by default.")
FORMAT = flags.DEFINE_enum(
    "format", "word2vec", ["word2vec", "word2vec_binary", "glove"], "Format of the vectors written."
)
OUT: flags.FlagHolder[Any] = flags.DEFINE_string("out", None, "File of vectors, or of a plot.")
VECTORS: flags.FlagHolder[Any] = flags.DEFINE_string("vectors", None, "File of vectors, of any format.")
LIMIT = flags.DEFINE_integer("limit", None, "Words that are read, the first.", lower_bound=1)
TESTS = flags.DEFINE_string("tests", "../shared/data/word_similarity", "Folder of the test sets.")
ANSWERS = flags.DEFINE_integer("answers", 300_000, "Words that may be answers of analogies, the first.", lower_bound=1)
METHOD = flags.DEFINE_enum("method", "3cosadd", METHODS, "How analogies are scored.")
WORD = cli.define_text("word", "Word whose neighbours are shown.")
WORDS = flags.DEFINE_list("words", [], "Words of an analogy (a to b as c to what), or of a plot.")
TOP = flags.DEFINE_integer("top", 10, "Number of words shown.", lower_bound=1)
PLANE = flags.DEFINE_enum("plane", "pca", ["pca", "tsne"], "How the plot's plane is found.")
JSON_OUT: flags.FlagHolder[Any] = flags.DEFINE_string("json", None, "Write the numbers to this file.")

READ = [VECTORS, LIMIT, INVALID]
OF_LOSSES = {
    "negatives": ("negative_sampling",),
    **dict.fromkeys(("shared", "exponent"), ("negative_sampling", "sampled")),
}
COMMANDS: dict[str, list[flags.FlagHolder[Any]]] = {
    "train": [CORPUS, INVALID, MIN_COUNT, MAX_SIZE, *MODEL, EPOCHS, RATE, SEED, WORKDIR, FORMAT, OUT],
    "evaluate": [*READ, TESTS, ANSWERS, METHOD, JSON_OUT],
    "nearest": [*READ, WORD, TOP, JSON_OUT],
    "analogy": [*READ, WORDS, METHOD, TOP, JSON_OUT],
    "plot": [*READ, WORDS, PLANE, OUT],
}


def _config() -> Word2VecConfig:
    values = {flag.name: flag for flag in MODEL}
    loss = values["loss"].value
    for name, losses in OF_LOSSES.items():
        if values[name].present and loss not in losses:
            raise ValueError(f"--{name} needs --loss={' or '.join(losses)}, not {loss}")
    if values["subsampling"].present and not values["sample"].value:
        raise ValueError("--subsampling has no effect with --sample=0")
    return Word2VecConfig(**{name: flag.value for name, flag in values.items()})


def _about() -> dict[str, Any]:
    """What training wrote about the vectors that are read now; nothing of vectors from elsewhere."""
    path = _beside(VECTORS.value)
    about = json.loads(path.read_text()) if path.exists() else {}
    return about if about.get("bytes") == epath.Path(VECTORS.value).stat().length else {}


def _beside(vectors: str) -> epath.Path:
    return epath.Path(f"{vectors}.training.json")


def train() -> None:
    """Reads, trains, writes vectors and, beside them, how fast that was."""
    cli.need(CORPUS, OUT)
    config = _config()
    schedule = word2vec_run.Word2VecSchedule(EPOCHS.value, RATE.value, min(RATE.value, 1e-4), SEED.value)
    reader = sentences.Reader(sorted(glob.glob(CORPUS.value)) or [CORPUS.value], INVALID.value)
    words, text = word2vec_run.read(reader, MIN_COUNT.value, MAX_SIZE.value)
    if reader.invalid:
        print(f"{reader.invalid:,} lines were no UTF-8 (--invalid={INVALID.value})")
    share = len(text.words) / text.total
    print(f"{text.total:,} words, {len(words):,} different ones kept, which are {share:.1%} of the text")
    workdir = WORKDIR.value or f"{OUT.value}.run"
    table = word2vec_run.train(config, schedule, text, workdir)
    files.write(OUT.value, words, table, FORMAT.value)
    rate = word2vec_run.words_per_second(workdir)
    about = {"words_per_second": rate, "epochs": EPOCHS.value, "bytes": epath.Path(OUT.value).stat().length}
    _beside(OUT.value).write_text(json.dumps(about))
    speed = "" if rate is None else f", {rate:,.0f} words a second"
    print(f"{len(words):,} vectors of {config.size} numbers in {OUT.value}{speed}")


def evaluate(vectors: WordVectors) -> None:
    """Likeness and analogies."""
    quality = evaluation.evaluate(vectors, TESTS.value, METHOD.value, ANSWERS.value)
    for name, like in quality.similarity.items():
        correlations = f"Spearman {like.spearman:.4f}, Pearson {like.pearson:.4f}"
        print(f"{name}: {correlations}, {like.pairs} pairs, {like.missing} unknown")
    r = quality.analogies
    for name, part in {"all": r.total, "semantic": r.semantic, "syntactic": r.syntactic, **r.sections}.items():
        print(f"analogies, {name}: {part.correct:,} of {part.asked:,} ({part.share:.2%}), {part.missing:,} unknown")
    found = quality.to_dict()
    if rate := _about().get("words_per_second"):
        found["words_per_second"] = rate
    cli.write_json(JSON_OUT, found)


def nearest(vectors: WordVectors) -> None:
    """Words like a word."""
    cli.need(WORD)
    found = vectors.nearest(WORD.value, TOP.value)
    for word, score in found:
        print(f"{score:.4f} {word}")
    cli.write_json(JSON_OUT, {"word": WORD.value, "nearest": found})


def analogy(vectors: WordVectors) -> None:
    """What is to the third word as the second to the first."""
    if len(WORDS.value) != 3:
        raise ValueError(f"--words={','.join(WORDS.value)} must be three words: man,king,woman")
    a, b, c = WORDS.value
    found = vectors.analogy(a, b, c, TOP.value, METHOD.value)
    for word, score in found:
        print(f"{score:.4f} {word}")
    cli.write_json(JSON_OUT, {"words": WORDS.value, "analogy": found})


def plot(vectors: WordVectors) -> None:
    """Words in a plane."""
    cli.need(WORDS, OUT)
    rows = vectors.unit[[vectors.row(w) for w in WORDS.value]]
    plots.draw(WORDS.value, {"pca": plots.pca, "tsne": plots.tsne}[PLANE.value](rows), OUT.value)
    print(f"{len(WORDS.value)} words in {OUT.value}")


def main(command: str) -> None:
    """Runs a command."""
    if command == "train":
        train()
        return
    cli.need(VECTORS)
    words, table = files.read(VECTORS.value, limit=LIMIT.value, invalid=INVALID.value)
    commands = {"evaluate": evaluate, "nearest": nearest, "analogy": analogy, "plot": plot}
    commands[command](WordVectors(words, np.asarray(table)))


if __name__ == "__main__":
    cli.run(main, COMMANDS)
