"""The cases: what takes turns, and what rows of the table come of it. A case names programs and imports none."""

from collections.abc import Callable

from experiments.benchmark.bench import Bench, Row
from experiments.benchmark.cases import deltas, families, gpt2, naive_bayes, ngrams, plans, shakespeare, word2vec

CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "train": gpt2.train,
    "memory": gpt2.memory,
    "decode": gpt2.decode,
    "compile": gpt2.compile_time,
    "shakespeare": shakespeare.train,
    "encode": families.encode,
    "translate": families.translate,
    "steps": families.steps,
    "ngrams": ngrams.estimate_and_query,
    "word2vec": word2vec.train,
    "bayes": naive_bayes.fit_and_predict,
    "plans": plans.train,
    "deltas": deltas.all_of,
}
