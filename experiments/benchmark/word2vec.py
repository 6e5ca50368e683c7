"""word2vec beside gensim: raw words a second, 100 dimensions, window 5, words that occur 5 times.

`python -m experiments.benchmark.word2vec SPEC` prints one JSON line: `what` is ours or gensim; `path` a text of a
sentence a line, null for the standard library's sources; `config` fields of `Word2VecConfig`; `epochs`, `seed`, and
`workers` of gensim; `save` a file for words and vectors. Vocabularies are made before the clock starts; ours leaves
out the first step, which compiles.

On the Brown corpus (1.1 million words), gensim 4.4 with 2 workers on the same machine's processor. Two cores of an
Intel Xeon, nothing beside it, jax 0.10.2, 3 epochs, medians of 3 turns: skip-gram with negative sampling 770,000
words/s against 577,000 (1.33), with a tree 201,000 against 581,000 (0.35), CBOW 1,017,000 against 1,650,000 (0.62).
An NVIDIA H100, jax 0.11.2, 5 epochs, medians of 3 seeds, gensim beside it with 2 workers: skip-gram 15.7 million
against 0.43 (37; with 16 workers 2.19), CBOW 16.7 against 1.47 (11), tree 11.1 against 0.45 (25); of longer blocks,
--block=1024 --blocks=64, 18.5 in the place of 13.3 (40 epochs, one seed).

After 5 epochs (WordSim-353, SimLex-999, analogies; means of 5 seeds with their spread):
    skip-gram  0.258 (0.008)  0.151 (0.006)  3.0 % (0.2)    gensim  0.259 (0.008)  0.157 (0.006)  3.0 % (0.1)
    CBOW       0.118 (0.020)  0.130 (0.005)  2.7 % (0.2)            0.096 (0.010)  0.113 (0.013)  2.9 % (0.2)
    tree       0.275 (0.013)  0.089 (0.007)  3.6 % (0.2)            0.277 (0.014)  0.087 (0.006)  3.8 % (0.1)
    H100, 3 seeds: skip-gram 0.263, 0.155, 2.9 %; CBOW 0.130, 0.133, 2.7 %; tree 0.275, 0.094, 3.7 %

Where the time goes (skip-gram, a block, profiled): 45 % products of tiles, 28 % rows (gathered, scaled, added), 25 %
slopes, bands and transposes of scores. Of two cores 1.3 are busy: what a block does is too small to be divided.

Tried: blocks of 4,096 words and more (up to 52 million words/s) learn nothing on so small a text; two scatters into
one table, and the loss by a branch within the loop: XLA:CPU copies tables whole (2.8 in the place of 1.2 us of
processor a word); gradients of the rows by autodiff, whose transposed products XLA:CPU computes by slow loops (35 in
the place of 16 us a word for trees); a product for each tile (`lax.map`) in the place of batched ones, no faster; 32
shared negatives in the place of 64: a quarter faster, SimLex and analogies 0.148 and 2.7 %.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments.benchmark import ngrams
from llm_jax.classic.text import sentences

MIN_COUNT = 5


def ours(spec: dict[str, Any]) -> tuple[float, list[str], np.ndarray]:
    """(words a second, words, vectors)."""
    import jax

    from llm_jax.classic.vectors import noise, word2vec
    from llm_jax.classic.vectors.windows import Windows
    from llm_jax.tasks import word2vec_run

    config = word2vec.Word2VecConfig(**{**spec["config"], **({"block": 64, "blocks": 2} if spec.get("tiny") else {})})
    schedule = word2vec_run.Schedule(spec["epochs"], seed=spec["seed"])
    words, text = word2vec_run.read(sentences.Reader([spec["path"]]), MIN_COUNT)
    keep = noise.keep_probabilities(text.counts, config.sample, config.subsampling)
    windows = Windows(config, text.words, text.sentences, keep, schedule.epochs, schedule.seed)
    step = jax.jit(word2vec_run.make_step(config, schedule, windows.steps, 0.0), donate_argnums=0)
    known = word2vec.known(config, text.counts)
    state = jax.jit(lambda: word2vec_run.first_state(config, schedule, len(words)))()
    for i in range(windows.steps):
        if i == 1:
            begin = time.perf_counter()
        state, numbers = step(state, next(windows), known)
        jax.device_get(numbers)
    share = (windows.steps - 1) / windows.steps
    rate = spec["raw"] * schedule.epochs * share / (time.perf_counter() - begin)
    return rate, words, np.asarray(state.params["context"])


def gensim(spec: dict[str, Any]) -> tuple[float, list[str], np.ndarray]:
    """The same."""
    try:
        from gensim.models import Word2Vec
    except ImportError:
        sys.exit(42)
    with open(spec["path"], encoding="utf-8") as f:
        text = [line.split() for line in f]
    c = spec["config"]
    of_tree = c.get("loss") == "hierarchical"
    model = Word2Vec(
        vector_size=100, window=5, min_count=MIN_COUNT, sample=1e-3, workers=spec["workers"], seed=spec["seed"],
        sg=int(c.get("architecture") != "cbow"), negative=0 if of_tree else 5, hs=int(of_tree),
    )  # fmt: skip
    model.build_vocab(text)
    begin = time.perf_counter()
    model.train(text, total_examples=len(text), epochs=spec["epochs"])
    rate = spec["raw"] * spec["epochs"] / (time.perf_counter() - begin)
    return rate, model.wv.index_to_key, model.wv.vectors


def measure(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """`value` in words a second."""
    path = os.path.join(folder, "text.txt") if spec["path"] is None else spec["path"]
    if spec["path"] is None:
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(ngrams.library_lines(spec["tiny"])) + "\n")
    spec = {**spec, "path": path}
    with open(path, encoding="utf-8") as f:
        spec["raw"] = sum(len(line.split()) for line in f)
    value, names, vectors = {"ours": ours, "gensim": gensim}[spec["what"]](spec)
    if spec.get("save"):
        np.savez(spec["save"], words=np.array(names), vectors=vectors)
    return {"value": value}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(json.loads(sys.argv[1]), scratch)))
