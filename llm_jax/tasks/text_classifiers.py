"""Text classifiers from before pre-training, trained, stored and measured alike.

A folder holds the model's files and `classify.json`: its kind and the names of its labels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.classic.ngrams.stored import StoredError
from llm_jax.classic.text import naive_bayes, tfidf
from llm_jax.interop import classifier_folder
from llm_jax.interop.classifier_folder import LogProbs
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.tasks import text_sets
from llm_jax.tasks.classification_rows import TextConfig, word_table
from llm_jax.tasks.text_sets import TextSets

FILE = "classify.json"
Parts = Mapping[str, tuple[list[str], np.ndarray]]  # texts and the numbers of their labels; `train` is one


class Trained(NamedTuple):
    """A classifier in memory.

    Attributes:
      log_probs: `texts -> [N, C]`.
      write: writes its files into a folder.
    """

    log_probs: LogProbs
    write: Callable[[epath.PathLike], None]


class NaiveBayesConfig(NamedTuple):
    """Naive Bayes on counts or tf-idf.

    Attributes:
      features: what a term is, and what it weighs.
      kind: one of `naive_bayes.KINDS`.
      alpha: what every term has been seen more in every class.
      priors: of the classes, `fitted` or `uniform`.
      norm: normalises the weights of `kind="complement"`.
    """

    features: tfidf.Options
    kind: str = "multinomial"
    alpha: float = 1.0
    priors: str = "fitted"
    norm: bool = False


class WordsConfig(NamedTuple):
    """Word vectors under an LSTM or a CNN.

    Attributes:
      model: of the net; its vocabulary is made from the texts.
      training: how it is trained.
    """

    model: TextClassifierConfig
    training: TextConfig


def parts_of(sets: TextSets, labels: Sequence[str]) -> Parts:
    """The parts that hold any text.

    Raises:
      CorpusError: for a label that is not in `labels`.
    """
    return {part: text_sets.numbered(examples, labels) for part, examples in sets._asdict().items() if examples}


def train(
    config: NaiveBayesConfig | WordsConfig,
    parts: Parts,
    num_labels: int,
    folder: epath.PathLike,
    say: Callable[[str], object] = print,
) -> Trained:
    """Trains on the part `train`.

    Args:
      config: of the classifier.
      parts: the epoch of the lowest loss on `dev` is taken, of a net.
      num_labels: C.
      folder: of the run of a net, which resumes.
      say: is told what is known of the texts' words.

    Raises:
      ValueError: for texts without terms or words, and what `tasks.classification.train` refuses.
    """
    texts, classes = parts["train"]
    if isinstance(config, NaiveBayesConfig):
        features, counts = tfidf.TfIdf.fit_transform(texts, config.features)
        model = naive_bayes.fit(counts, classes, num_labels, config.kind, config.alpha, config.priors, config.norm)
        say(f"{len(features.terms):,} terms")

        def write(folder: epath.PathLike) -> None:
            tfidf.save(features, folder)
            naive_bayes.save(model, folder)

        return Trained(lambda texts: naive_bayes.log_probs(model, features.transform(texts)), write)
    from llm_jax.tasks import classification  # what a run needs takes seconds to import, and naive Bayes needs none

    words = word_table(texts, config.training)
    say(words.describe())
    net, params = classification.train(*config, words, parts["train"], parts.get("dev"), folder)
    trained = net, params, words.words, config.training.max_length
    return Trained(classifier_folder.log_probs(*trained), lambda folder: classifier_folder.save(*trained, folder))


def save(trained: Trained, kind: str, labels: Sequence[str], folder: epath.PathLike) -> None:
    """Writes the model's files, then `classify.json`, without which a folder is none."""
    file = epath.Path(folder) / FILE
    file.unlink(missing_ok=True)  # of a model that was there before
    trained.write(folder)
    file.write_text(json.dumps({"model": kind, "labels": list(labels)}))


def load(folder: epath.PathLike) -> tuple[LogProbs, list[str]]:
    """(`texts -> [N, C]`, the names of the labels) of what `save` wrote.

    Raises:
      ValueError: for a folder that holds none, or whose files are damaged.
    """
    file = epath.Path(folder) / FILE
    if not file.is_file():
        raise StoredError(f"{folder} holds no {FILE}: `classify train --out` writes one")
    loaders: dict[str, Callable[[epath.PathLike], LogProbs]] = {
        "naive_bayes": _load_naive_bayes,
        "lstm": classifier_folder.load,
        "cnn": classifier_folder.load,
    }
    try:
        about = json.loads(file.read_text())
        load_kind, labels = loaders[about["model"]], list(about["labels"])
    except (ValueError, KeyError, TypeError) as e:
        raise StoredError(f"{file} cannot be read: {e!r}") from None
    return load_kind(folder), labels


def _load_naive_bayes(folder: epath.PathLike) -> LogProbs:
    features, model = tfidf.load(folder), naive_bayes.load(folder)
    return lambda texts: naive_bayes.log_probs(model, features.transform(texts))


def predict(log_probs: LogProbs, labels: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Of every text: `text`, `label`, the most probable one, and the `probabilities` of all."""
    rows = []
    for text, p in zip(texts, np.exp(log_probs(texts)), strict=True):
        probabilities = dict(zip(labels, p.tolist(), strict=True))
        rows.append({"text": text, "label": labels[p.argmax()], "probabilities": probabilities})
    return rows


def measure(log_probs: LogProbs, parts: Parts, num_labels: int) -> dict[str, dict[str, float]]:
    """`text_sets.quality` of every part."""
    return {
        part: text_sets.quality(classes, log_probs(texts).argmax(1), num_labels)
        for part, (texts, classes) in parts.items()
    }
