"""KenLM's queries and memory, from the ARPA file of our model."""

import os
import tempfile
from pathlib import Path
from typing import Any

import kenlm

from experiments.benchmark.ours.ngrams import Lines, lines_of, median, model_of, num_ngrams
from llm_jax.classic.ngrams import arpa


def _load(model: Any) -> tuple[Any, int]:
    """(KenLM's model, bytes that it adds to this process)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.arpa")
        arpa.write(model, path)
        before = _resident()
        theirs = kenlm.Model(path)
        return theirs, _resident() - before


def _resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _model(spec: dict[str, Any]) -> tuple[Any, Lines]:
    lines = lines_of(spec)
    return _load(model_of(lines))[0], lines


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Bytes an n-gram of its hash tables ("probing")."""
    model = model_of(lines_of(spec))
    return {"value": _load(model)[1] / num_ngrams(model)}


def query_lines(spec: dict[str, Any]) -> dict[str, Any]:
    """Words and ends of sentences a second of a loop over lines."""
    model, lines = _model(spec)
    return {"value": lines.tokens / median(lambda: [model.score(line) for line in lines.asked])}


def query_words(spec: dict[str, Any]) -> dict[str, Any]:
    """Words and ends of sentences a second of a loop over words."""
    model, lines = _model(spec)
    split = [[*line.split(), "</s>"] for line in lines.asked]

    def run() -> None:
        for sentence in split:
            state, after = kenlm.State(), kenlm.State()
            model.BeginSentenceWrite(state)
            for word in sentence:
                model.BaseScore(state, word, after)
                state, after = after, state

    return {"value": lines.tokens / median(run)}
