"""A trained text classifier in a folder: `text_classifier.json` (config and words) and `model.safetensors`."""

import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from llm_jax import config as configs
from llm_jax.classic.text.vocabulary import SPECIAL, Words
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.nn import paths
from llm_jax.nn.protocols import Model, Params
from llm_jax.storage.safetensors import TensorFolder, write_folder

FILE = "text_classifier.json"
LogProbs = Callable[[Sequence[str]], np.ndarray]  # texts -> log-probabilities of their classes, `[N, C]`


def save(model: TextClassifierConfig, params: Params, words: Words, max_length: int, folder: epath.PathLike) -> None:
    """Writes `text_classifier.json` and `model.safetensors`."""
    folder = epath.Path(folder)
    (folder / FILE).unlink(missing_ok=True)
    write_folder(folder, ((path, np.asarray(x)) for path, x in paths.flatten(params)))
    vocabulary = {"tokenize": words.tokenize, "max_length": max_length, "words": words.words[len(SPECIAL) :]}
    # written last: without it the folder holds no classifier
    (folder / FILE).write_text(json.dumps({"model": configs.to_dict(model), **vocabulary}))


def load(folder: epath.PathLike) -> LogProbs:
    """`log_probs` of the classifier that `save` wrote.

    Raises:
      ValueError: for a folder that holds none, or whose files are damaged or do not fit together.
    """
    file = epath.Path(folder) / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {FILE}: it is not a text classifier, or its training was cut short")
    try:
        about = json.loads(file.read_text())
        model = configs.from_dict(TextClassifierConfig, about["model"])
        words, max_length = Words(about["words"], about["tokenize"]), int(about["max_length"])
        stored = TensorFolder(folder)
        params = paths.nested((name, np.asarray(stored[name])) for name in stored)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: the model cannot be read: {e!r}") from None
    if model.vocab_size != len(words):
        raise ValueError(f"{file}: vocab_size={model.vocab_size} with {len(words)} words")
    return log_probs(model, params, words, max_length)


def log_probs(
    model: TextClassifierConfig, params: Params, words: Words, max_length: int, batch_size: int = 100
) -> LogProbs:
    """`texts -> float32 [N, C]`, natural logarithms; only the first `max_length` words of a text are read."""
    module: Model = model.make()
    run = jax.jit(lambda params, ids: jax.nn.log_softmax(module.apply({"params": params}, ids).logits))

    def apply(texts: Sequence[str]) -> np.ndarray:
        ids, _ = words.encode(texts, max_length)
        padded = np.pad(ids, ((0, -len(ids) % batch_size), (0, -ids.shape[1] % 64)))  # few shapes
        if not len(ids):
            return np.zeros((0, model.num_labels), np.float32)
        parts = [np.asarray(run(params, padded[i : i + batch_size])) for i in range(0, len(padded), batch_size)]
        return np.concatenate(parts)[: len(ids)]

    return apply
