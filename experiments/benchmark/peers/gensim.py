"""gensim's word2vec: raw words a second of training, vocabulary apart."""

import time
from typing import Any

from gensim.models import Word2Vec

from experiments.benchmark.ours.word2vec import MIN_COUNT, save, text_file


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Words a second with `workers` threads."""
    with text_file(spec) as (path, raw), open(path, encoding="utf-8") as f:
        text = [line.split() for line in f]
    config, epochs = spec["config"], spec["epochs"]
    of_tree = config.get("loss") == "hierarchical"
    model = Word2Vec(
        vector_size=100, window=5, min_count=MIN_COUNT, sample=1e-3, workers=spec["workers"], seed=spec["seed"],
        sg=int(config.get("architecture") != "cbow"), negative=0 if of_tree else 5, hs=int(of_tree),
    )  # fmt: skip
    model.build_vocab(text)
    begin = time.perf_counter()
    model.train(text, total_examples=len(text), epochs=epochs)
    seconds = time.perf_counter() - begin
    save(spec, model.wv.index_to_key, model.wv.vectors)
    return {"value": raw * epochs / seconds}
