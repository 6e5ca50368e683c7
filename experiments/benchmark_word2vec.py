"""word2vec beside gensim: raw words a second, and how good the vectors are.

`python -m experiments.benchmark_word2vec SPEC` prints one JSON line: `what` is ours or gensim; `path` a text of a
sentence a line; `config` fields of `Word2VecConfig`; `epochs`, `seed`, `workers`. The vocabulary is made before the
clock starts; ours leaves out the first step, which compiles.
"""

import json
import sys
import time
from typing import Any

import numpy as np

from llm_jax.classic import sentences

MIN_COUNT = 5


def ours(spec: dict[str, Any]) -> tuple[float, list[str], np.ndarray]:
    """(words a second, words, vectors)."""
    import jax

    from llm_jax.classic import noise, word2vec
    from llm_jax.classic.windows import Windows
    from llm_jax.training import word_vectors

    config = word2vec.Word2VecConfig(**spec["config"])
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


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    with open(wanted["path"], encoding="utf-8") as file:
        wanted["raw"] = sum(len(line.split()) for line in file)
    value, names, vectors = {"ours": ours, "gensim": gensim}[wanted["what"]](wanted)
    if wanted.get("save"):
        np.savez(wanted["save"], words=np.array(names), vectors=vectors)
    print(json.dumps({"value": value}))
