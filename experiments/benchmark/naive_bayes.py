"""Tf-idf and multinomial naive Bayes beside scikit-learn's: texts a second of fitting and of answering.

`python -m experiments.benchmark.naive_bayes SPEC` prints one JSON line, or exits with 42 without scikit-learn:
`what` is ours or scikit-learn, `part` fit or predict, `ngrams` the longest, `tiny` few texts. Texts are SST-2's where
the shared data are, else paragraphs of the standard library's sources, their class a module's initial: a to m or not.

On 2 cores of an Intel Xeon, nothing beside it, scikit-learn 1.9.1, SST-2, medians of three turns: fitting 111,000
texts/s against 70,000 (1.59), with pairs of words 53,000 against 24,000 (2.20); answering 119,000 against 92,000
(1.30), with pairs 58,000 against 43,000 (1.34). Where the time goes says llm_jax/classic/text/document_terms.py.
"""

import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.ngrams import median
from llm_jax.classic.text import naive_bayes, tfidf
from llm_jax.tasks import text_sets

Texts = tuple[list[str], np.ndarray]


def _library(tiny: bool) -> Texts:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[:: 20 if tiny else 1]
    parts = [(p, int(f.name > "n")) for f in files for p in f.read_text(errors="ignore").split("\n\n") if p.strip()]
    return [text for text, _ in parts], np.array([label for _, label in parts])


def texts(tiny: bool) -> Texts:
    """(texts, their classes), 0 or 1."""
    if tiny or not Path(text_sets.FOLDER, text_sets.SST2.train).is_file():
        return _library(tiny)
    return text_sets.numbered(text_sets.read("sst2").train, ("0", "1"))


def _ours(given: Texts, ngrams: int) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    def fit() -> tuple[tfidf.TfIdf, naive_bayes.NaiveBayes]:
        features, counts = tfidf.TfIdf.fit_transform(given[0], tfidf.Options(ngrams=(1, ngrams)))
        return features, naive_bayes.fit(counts, given[1], 2)

    features, model = fit()
    return fit, lambda: naive_bayes.predict(model, features.transform(given[0]))


def _theirs(given: Texts, ngrams: int) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.pipeline import make_pipeline
    except ImportError:
        sys.exit(42)
    fit = lambda: make_pipeline(TfidfVectorizer(ngram_range=(1, ngrams)), MultinomialNB()).fit(*given)
    model = fit()
    return fit, lambda: model.predict(given[0])


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """`value` in texts a second, `accuracy` on the same texts."""
    given = texts(spec["tiny"])
    fit, predict = {"ours": _ours, "scikit-learn": _theirs}[spec["what"]](given, spec["ngrams"])
    seconds = median({"fit": fit, "predict": predict}[spec["part"]])
    return {"value": len(given[0]) / seconds, "accuracy": float((predict() == given[1]).mean())}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
