"""scikit-learn's tf-idf and multinomial naive Bayes."""

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from experiments.benchmark.ours.naive_bayes import Classifier, Texts, speed


def _fit(texts: Texts, longest: int) -> Any:
    return make_pipeline(TfidfVectorizer(ngram_range=(1, longest)), MultinomialNB()).fit(*texts)


def _predict(model: Any, texts: list[str]) -> np.ndarray:
    return model.predict(texts)


def measure(spec: dict[str, Any]) -> dict[str, float]:
    """See `speed`."""
    return speed(spec, Classifier(_fit, _predict))
