"""word2vec beside gensim: raw words a second, 100 dimensions, window 5, words that occur 5 times.

`python -m experiments.benchmark_word2vec SPEC` prints one JSON line: `what` is ours or gensim; `path` a text of a
sentence a line, null for the standard library's sources; `config` fields of `Word2VecConfig`; `epochs`, `seed`, and
`workers` of gensim; `save` a file for words and vectors. Vocabularies are made before the clock starts; ours leaves
out the first step, which compiles.

On the Brown corpus (1.1 million words), jax 0.11.2, gensim 4.4 with 2 workers on the host's processor: on an NVIDIA
H100, 5 epochs, skip-gram with negative sampling 19.1 million words/s against 0.54 (with 16 workers 2.16); on an H200,
40 epochs against 3 of gensim's, 14.5 against 0.37, CBOW 15.3 against 1.08. Over 5 seeds of 5 epochs (mean, and spread
of seeds) skip-gram's WordSim-353 was 0.267 (0.009) against 0.259 (0.008), SimLex-999 0.148 (0.004) against 0.157
(0.006), analogies 2.9 % (0.2) against 3.0 % (0.1).

Tried: blocks of 4,096 words and more (up to 52 million words/s) learn nothing on so small a text; gradients of the rows
by autodiff, whose transposed products XLA:CPU computes by slow loops (35 in the place of 16 us a word for trees); a
product for each tile (`lax.map`) in the place of batched ones, no faster.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments import benchmark_classic
from llm_jax.classic import sentences

MIN_COUNT = 5


def ours(spec: dict[str, Any]) -> tuple[float, list[str], np.ndarray]:
    """(words a second, words, vectors)."""
    import jax

    from llm_jax.classic import noise, word2vec
    from llm_jax.classic.windows import Windows
    from llm_jax.training import word_vectors

    config = word2vec.Word2VecConfig(**{**spec["config"], **({"block": 64, "blocks": 2} if spec.get("tiny") else {})})
    schedule = word_vectors.Schedule(spec["epochs"], seed=spec["seed"])
    words, text = word_vectors.read(sentences.Reader([spec["path"]]), MIN_COUNT)
    keep = noise.keep_probabilities(text.counts, config.sample, config.subsampling)
    windows = Windows(config, text.words, text.sentences, keep, schedule.epochs, schedule.seed)
    step = jax.jit(word_vectors.make_step(config, schedule, windows.steps, 0.0), donate_argnums=0)
    known = word2vec.known(config, text.counts)
    state = jax.jit(lambda: word_vectors.first_state(config, schedule, len(words)))()
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
            f.write("\n".join(benchmark_classic.library_lines(spec["tiny"])) + "\n")
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
