"""Word vectors from counts of the words around words: PPMI and its singular values, or GloVe.

python -m experiments.count_vectors --corpus='texts/*.txt' --method=svd --size=100 --window=5 --out=runs/svd.txt
python -m experiments.count_vectors --corpus='texts/*.txt' --method=glove --epochs=25 --out=runs/glove.txt

Texts have a sentence a line and blanks between words, `.gz` too. With --scratch=FOLDER pairs are counted through files,
so that a text beyond memory works. `experiments.word2vec` evaluates such vectors, finds neighbours and plots.
"""

import contextlib
import glob
import tempfile
from typing import Any

import jax
from absl import flags

from experiments import cli
from llm_jax.classic.text import sentences
from llm_jax.classic.vectors import co_occurrence, glove, streamed_co_occurrence
from llm_jax.interop.word_vectors import files

CORPUS: flags.FlagHolder[Any] = flags.DEFINE_string("corpus", None, "Files to learn from; a pattern.", required=True)
OUT: flags.FlagHolder[Any] = flags.DEFINE_string("out", None, "File of vectors.", required=True)
INVALID = flags.DEFINE_enum("invalid", "strict", sentences.POLICIES, "What becomes of lines that are not UTF-8.")
MIN_COUNT = flags.DEFINE_integer("min_count", 5, "Rarer words are left out.", lower_bound=1)
MAX_SIZE = flags.DEFINE_integer("max_vocabulary", None, "Keep so many words, the most frequent.", lower_bound=2)
SCRATCH: flags.FlagHolder[Any] = flags.DEFINE_string("scratch", None, "Count through files in this folder.")
METHOD = flags.DEFINE_enum("method", "svd", ["svd", "glove"], "PPMI's singular values, or GloVe.")
WINDOW = flags.DEFINE_integer("window", 5, "Words on either side.")
WEIGHTING = flags.DEFINE_enum(
    "weighting",
    None,
    list(co_occurrence.WEIGHTINGS),
    "What a pair counts for by its distance; by default linear, with --method=glove harmonic.",
)
SIZE = flags.DEFINE_integer("size", 100, "Width of the vectors.")
SEED = flags.DEFINE_integer("seed", 1, "Seed of GloVe's first vectors and order of pairs.", lower_bound=0)
OF_SVD = {
    "shift": flags.DEFINE_float("shift", 1.0, "k of PPMI, as if there were k negative samples."),
    "smoothing": flags.DEFINE_float("smoothing", 0.75, "Power of the contexts' counts."),
    "exponent": flags.DEFINE_float("exponent", 0.5, "Power of the singular values."),
}
OF_GLOVE = {
    "epochs": flags.DEFINE_integer("epochs", 25, "Passes over all pairs."),
    "learning_rate": flags.DEFINE_float("learning_rate", 0.05, "AdaGrad's learning rate."),
    "x_max": flags.DEFINE_float("x_max", 100.0, "Count from which on all pairs weigh the same."),
    "batch_size": flags.DEFINE_integer("batch_size", 4096, "Pairs in a batch."),
    "seed": SEED,
}
FORMAT = flags.DEFINE_enum("format", "word2vec", ["word2vec", "word2vec_binary", "glove"], "Format of the file.")


def main() -> None:
    """Counts, learns, writes."""
    is_glove = METHOD.value == "glove"
    for name, flag in (OF_SVD if is_glove else OF_GLOVE).items():
        if flag.present:
            raise ValueError(f"--{name} needs --method={'svd' if is_glove else 'glove'}, not {METHOD.value}")
    reader = sentences.Reader(sorted(glob.glob(CORPUS.value)) or [CORPUS.value], INVALID.value)
    kept: dict[str, Any] = dict(min_count=MIN_COUNT.value, max_size=MAX_SIZE.value)
    how = (WINDOW.value, WEIGHTING.value or ("harmonic" if is_glove else "linear"))
    with contextlib.ExitStack() as stack:
        if SCRATCH.value:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=SCRATCH.value, prefix="pairs_"))
            vocabulary, found = streamed_co_occurrence.cooccurrences(reader, folder, *how, **kept)
        else:
            vocabulary, text = sentences.read(reader, **kept)
            found = co_occurrence.cooccurrences(text, len(vocabulary), *how)
        if reader.invalid:
            print(f"{reader.invalid:,} lines were no UTF-8 (--invalid={INVALID.value})")
        first = len(sentences.SPECIAL)  # marks of sentences and unknown words are nobody's contexts
        words, found = vocabulary.words[first:], found[first:, first:]
        print(f"{len(words):,} words, {found.nnz:,} pairs")
        given: dict[str, Any] = {name: flag.value for name, flag in (OF_GLOVE if is_glove else OF_SVD).items()}
        if is_glove:
            key = jax.random.key(given.pop("seed"))
            table, losses = glove.train(found, key, SIZE.value, progress=True, **given)
            print(f"loss {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
        else:
            exponent = given.pop("exponent")
            table = co_occurrence.svd_vectors(co_occurrence.ppmi(found, **given), SIZE.value, exponent)
    files.write(OUT.value, words, table, FORMAT.value)
    print(f"{len(words):,} vectors of {SIZE.value} numbers in {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
