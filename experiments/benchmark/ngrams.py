"""N-gram models and KenLM's queries, on the words of the standard library's sources.

`python -m experiments.benchmark.ngrams SPEC` prints one JSON line, or exits with 42 where the kenlm package, which has
queries and no estimation, is not installed. Both answer from the same ARPA file, of order 5, on the text that it was
made of or on every tenth line of it, which then is left out. KenLM's loops take strings; ours takes numbers, or the
lines that KenLM takes (`numbered` is false, rows "from strings").

On Brown (1.2 million words and ends; one core of an Intel Xeon, nothing beside it, numpy 2.4, medians of three
turns, millions a second): counted text 14.2, from strings 7.5, KenLM's loop over lines 4.48 (3.2 and 1.7 times), over
words 2.07 (6.9 and 3.6); a tenth that was not counted, where most words fall back through all orders, 9.0 and 5.5,
KenLM 5.86 (1.5 and 0.9) and 2.29 (3.9 and 2.4). Counting and estimation from a file: 1.75.

Where the time goes: of counting and estimation half is sorting keys; of queries by hash tables
(`classic/ngrams/hashed.py`) nearly all is memory: a line of a table for every n-gram that is looked up. Numbering
(`classic/text/numbering.py`) takes 64 ns a word; splitting and Python's dictionary take 150. What was tried for
queries, on a busy machine: sorting and searching for each order, which texts shorter than the model still take (1.1 to
1.9); scipy's sparse rows (2.8); a table by history and word, order after order (4.3); tables by the hash of all words,
the longest first, in numpy (6 to 8), which stayed; the same compiled by XLA for the CPU, in one function or one a step
(0.9 to 2.6).

Memory: what KenLM's model (its hash tables, "probing") adds to the process, beside our sorted arrays, whose values are
float64, and our hash tables, which stand beside them: 22.1, 21.6 and 48.5 bytes an n-gram of Brown. Its paper (Heafield
2011, https://aclanthology.org/W11-2123) says 57 % of SRILM's memory.
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

from llm_jax.classic.ngrams import arpa, counting, hashed, smoothing
from llm_jax.classic.text import sentences

ORDER = 5


def median(run: Callable[[], Any]) -> float:
    """Seconds of a run, the median of five."""
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


def _estimate(path: str) -> Any:
    vocabulary, text = sentences.read(sentences.Reader([path]))
    return smoothing.estimate(counting.count(text, len(vocabulary), ORDER), vocabulary)


def _resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """`value` in words a second, ends of sentences among them, or in bytes an n-gram."""
    if spec.get("path"):
        lines = [line for line in Path(spec["path"]).read_text().split("\n") if line.split()]
    else:
        lines = library_lines(spec["tiny"])
    learned = [line for i, line in enumerate(lines) if i % 10] if spec.get("unseen") else lines
    asked = lines[::10] if spec.get("unseen") else lines
    paths = [os.path.join(folder, name) for name in ("learned.txt", "asked.txt", "model.arpa")]
    for path, text in zip(paths, (learned, asked), strict=False):
        Path(path).write_text("\n".join(text) + "\n")
    words = sum(len(line.split()) for line in asked)
    if spec["what"] == "estimate":
        return {"value": words / median(lambda: _estimate(paths[0]))}
    model = _estimate(paths[0])
    grams = sum(map(len, model.keys))
    if spec.get("loop") is None:
        if spec["what"] == "bytes":
            return {"value": model.nbytes / grams, "hashed": hashed.HashedModel(model).nbytes / grams}
        ours = hashed.HashedModel(model)
        number = lambda: model.vocabulary.encode_lines(asked)
        numbers = number()
        query = (lambda: ours.log_prob(numbers)) if spec.get("numbered", True) else (lambda: ours.log_prob(number()))
        return {"value": (words + len(asked)) / median(query)}
    try:
        import kenlm
    except ImportError:
        sys.exit(42)
    arpa.write(model, paths[2])
    before = _resident()
    theirs = kenlm.Model(paths[2])
    if spec["what"] == "bytes":
        return {"value": (_resident() - before) / grams}
    split = [[*line.split(), "</s>"] for line in asked]

    def by_words() -> None:
        for sentence in split:
            state, after = kenlm.State(), kenlm.State()
            theirs.BeginSentenceWrite(state)
            for word in sentence:
                theirs.BaseScore(state, word, after)
                state, after = after, state

    run = by_words if spec["loop"] == "words" else lambda: [theirs.score(line) for line in asked]
    return {"value": (words + len(asked)) / median(run)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(json.loads(sys.argv[1]), scratch)))
