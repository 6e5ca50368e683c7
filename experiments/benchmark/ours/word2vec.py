"""word2vec: raw words a second of training."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmark.ours.ngrams import library_lines
from llm_jax.classic.text import sentences
from llm_jax.classic.vectors import noise, word2vec
from llm_jax.classic.vectors.windows import Windows
from llm_jax.tasks import word2vec_run

MIN_COUNT = 5


@contextlib.contextmanager
def text_file(spec: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(a file with a sentence a line, its words): `path`, or the standard library's sources."""
    with tempfile.TemporaryDirectory() as folder:
        path = spec["path"]
        if path is None:
            path = os.path.join(folder, "text.txt")
            with open(path, "w", encoding="utf-8") as f:
                f.write("\n".join(library_lines(spec["tiny"])) + "\n")
        with open(path, encoding="utf-8") as f:
            words = sum(len(line.split()) for line in f)
        yield path, words


def save(spec: dict[str, Any], words: list[str], vectors: np.ndarray) -> None:
    """Writes words and vectors to the file `save`, if there is one."""
    if spec.get("save"):
        np.savez(spec["save"], words=np.array(words), vectors=vectors)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Words a second, without the first step; `config` has fields of `Word2VecConfig`."""
    sizes = {"block": 64, "blocks": 2} if spec["tiny"] else {}
    config = word2vec.Word2VecConfig(**{**spec["config"], **sizes})
    schedule = word2vec_run.Word2VecSchedule(spec["epochs"], seed=spec["seed"])
    with text_file(spec) as (path, raw):
        words, text = word2vec_run.read(sentences.Reader([path]), MIN_COUNT)
    keep = noise.keep_probabilities(text.counts, config.sample, config.subsampling)
    windows = Windows(config, text.words, text.sentences, keep, schedule.epochs, schedule.seed)
    step = jax.jit(word2vec_run.make_step(config, schedule, windows.steps, 0.0), donate_argnums=0)
    lookup = word2vec.make_lookup(config, text.counts)
    state = jax.jit(lambda: word2vec_run.first_state(config, schedule, len(words)))()
    for i in range(windows.steps):
        if i == 1:
            begin = time.perf_counter()
        state, numbers = step(state, next(windows), lookup)
        jax.device_get(numbers)
    seconds = time.perf_counter() - begin
    save(spec, words, np.asarray(state.params["context"]))
    share = (windows.steps - 1) / windows.steps
    return {"value": raw * schedule.epochs * share / seconds}
