"""N-gram models of order 5 and KenLM's queries, on the words of the standard library's sources or of --text.

Both answer from the same ARPA file, on the text that it was made of or on every tenth line of it, which then is left
out. The kenlm package has queries and no estimation. Its loops take strings; ours takes numbers, or the lines that
KenLM takes (rows "from strings").

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

from typing import Any

from experiments.benchmark.bench import Bench, Contestant, Row, row, value_of

LOOPS = {"lines": "peers.kenlm:query_lines", "words": "peers.kenlm:query_words"}
TEXTS = {"text that was counted": False, "text that was not": True}


def estimate_and_query(bench: Bench) -> list[Row]:
    """Words a second of estimation and of queries in one call, beside KenLM's by lines and by words; memory."""
    spec: dict[str, Any] = {"path": bench.text}
    runs: dict[str, Contestant] = {
        "estimate": ("ours.ngrams:estimate", spec),
        "arrays": ("ours.ngrams:memory", spec),
        "kenlm": ("peers.kenlm:memory", spec),
    }
    for text, unseen in TEXTS.items():
        asked = {**spec, "unseen": unseen}
        runs[text] = ("ours.ngrams:query", asked)
        runs[f"{text}, from strings"] = ("ours.ngrams:query", {**asked, "numbered": False})
        runs |= {f"{text}, {loop}": (program, asked) for loop, program in LOOPS.items()}
    results = bench.turns(runs)
    rows = [row("n-grams, order 5, from text", results["estimate"]["value"], "-", None, "words/s")]
    for text in TEXTS:
        for ours in (text, f"{text}, from strings"):
            for loop in LOOPS:
                theirs, peer = value_of(results, f"{text}, {loop}"), f"kenlm, loop over {loop}"
                rows.append(row(f"n-grams, order 5, {ours}", results[ours]["value"], peer, theirs, "words/s"))
    theirs = value_of(results, "kenlm")
    for name, size in (("sorted", results["arrays"]["value"]), ("hash tables", results["arrays"]["hashed"])):
        rows.append(row(f"n-grams, order 5, {name}", size, "kenlm, probing", theirs, "bytes/n-gram"))
    return rows
