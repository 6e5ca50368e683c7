"""Tf-idf and multinomial naive Bayes beside scikit-learn's: texts a second of fitting and of answering.

Texts are SST-2's where the shared data are, else paragraphs of the standard library's sources, their class a module's
initial: a to m or not.

On 2 cores of an Intel Xeon, nothing beside it, scikit-learn 1.9.1, SST-2, medians of three turns: fitting 111,000
texts/s against 70,000 (1.59), with pairs of words 53,000 against 24,000 (2.20); answering 119,000 against 92,000
(1.30), with pairs 58,000 against 43,000 (1.34). Where the time goes says llm_jax/classic/text/document_terms.py.
"""

from experiments.benchmark.bench import Bench, Row


def fit_and_predict(bench: Bench) -> list[Row]:
    """Single words, and pairs too."""
    rows = []
    for terms, longest in (("words", 1), ("words and pairs", 2)):
        for part in ("fit", "predict"):
            spec, case = {"part": part, "ngrams": longest}, f"tf-idf and naive Bayes, {part}, {terms}"
            ours, theirs = ("ours.naive_bayes:measure", spec), ("peers.sklearn:measure", spec)
            rows.append(bench.beside(case, ours, "scikit-learn", theirs, "texts/s"))
    return rows
