"""N-gram models and KenLM's queries, on the words of the standard library's sources.

`python -m experiments.benchmark_classic SPEC` prints one JSON line, or exits with 42 where the kenlm package, which has
queries and no estimation, is not installed. Both answer from the same ARPA file, of order 5.

Where the time goes: reading is half Python's dictionary; of counting and estimation half is sorting keys, and of
queries nearly all (an argsort and a search in order for each order, in the place of random searches that take four
times as long).
"""

import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.classic import arpa, counting, sentences, smoothing

ORDER = 5


def _median(run: Callable[[], Any]) -> float:
    """Seconds of one of five runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def library_lines(tiny: bool) -> list[str]:
    """Of the standard library's sources, words between blanks."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 5 if tiny else None]
    words = (line.split() for f in files for line in f.read_text(errors="ignore").splitlines())
    return [" ".join(w) for w in words if w]


def _estimate(path: str) -> tuple[Any, Any]:
    vocabulary, text = sentences.read(sentences.Reader([path]))
    return smoothing.estimate(counting.count(text, len(vocabulary), ORDER), vocabulary), text


def measure(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """`value` in words a second."""
    path = os.path.join(folder, "text.txt")
    lines = library_lines(spec["tiny"])
    Path(path).write_text("\n".join(lines) + "\n")
    words = sum(len(line.split()) for line in lines)
    if spec["what"] == "estimate":
        return {"value": words / _median(lambda: _estimate(path))}
    model, text = _estimate(path)
    if spec.get("loop") is None:
        return {"value": (words + len(lines)) / _median(lambda: model.log_prob(text))}
    try:
        import kenlm
    except ImportError:
        sys.exit(42)
    arpa.write(model, os.path.join(folder, "model.arpa"))
    theirs = kenlm.Model(os.path.join(folder, "model.arpa"))
    split = [[*line.split(), "</s>"] for line in lines]

    def by_words() -> None:
        for sentence in split:
            state, after = kenlm.State(), kenlm.State()
            theirs.BeginSentenceWrite(state)
            for word in sentence:
                theirs.BaseScore(state, word, after)
                state, after = after, state

    run = by_words if spec["loop"] == "words" else lambda: [theirs.score(line) for line in lines]
    return {"value": (words + len(lines)) / _median(run)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(json.loads(sys.argv[1]), scratch)))
