"""Tf-idf and multinomial naive Bayes: texts a second of fitting and of answering."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.ours.ngrams import median
from llm_jax.classic.text import naive_bayes, tfidf
from llm_jax.tasks import text_sets

Texts = tuple[list[str], np.ndarray]


def _library(tiny: bool) -> Texts:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[:: 20 if tiny else 1]
    parts = [(p, int(f.name > "n")) for f in files for p in f.read_text(errors="ignore").split("\n\n") if p.strip()]
    return [text for text, _ in parts], np.array([label for _, label in parts])


def _texts(tiny: bool) -> Texts:
    """(texts, their classes), 0 or 1."""
    if tiny or not Path(text_sets.FOLDER, text_sets.SST2.train).is_file():
        return _library(tiny)
    return text_sets.numbered(text_sets.read("sst2").train, ("0", "1"))


class Classifier(NamedTuple):
    """What is measured.

    Attributes:
      fit: (texts, longest n-gram) -> model.
      predict: (model, texts) -> their classes.
    """

    fit: Callable[[Texts, int], Any]
    predict: Callable[[Any, list[str]], np.ndarray]


def speed(spec: dict[str, Any], classifier: Classifier) -> dict[str, float]:
    """`value` in texts a second of `part` (fit or predict), `accuracy` on the same texts."""
    texts, longest = _texts(spec["tiny"]), spec["ngrams"]
    model = classifier.fit(texts, longest)
    if spec["part"] == "fit":
        seconds = median(lambda: classifier.fit(texts, longest))
    else:
        seconds = median(lambda: classifier.predict(model, texts[0]))
    right = classifier.predict(model, texts[0]) == texts[1]
    return {"value": len(texts[0]) / seconds, "accuracy": float(right.mean())}


def _fit(texts: Texts, longest: int) -> tuple[tfidf.TfIdf, naive_bayes.NaiveBayes]:
    features, counts = tfidf.TfIdf.fit_transform(texts[0], tfidf.Options(ngrams=(1, longest)))
    return features, naive_bayes.fit(counts, texts[1], 2)


def _predict(model: tuple[tfidf.TfIdf, naive_bayes.NaiveBayes], texts: list[str]) -> np.ndarray:
    features, classes = model
    return naive_bayes.predict(classes, features.transform(texts))


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """See `speed`."""
    return speed(spec, Classifier(_fit, _predict))
