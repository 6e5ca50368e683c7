"""Flags of classify's LSTM and CNN, and the configs that they make."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from llm_jax.classic.text.sentences import POLICIES
from llm_jax.models.text_classifier import POOLINGS, TextClassifierConfig
from llm_jax.tasks.classification_rows import EMBEDDINGS, TextConfig

LSTM, CNN = ("hidden_dim", "num_layers", "pooling"), ("widths", "filters")
Flags = Mapping[str, flags.FlagHolder[Any]]


def define() -> Flags:
    """The flags of both nets, by name."""
    how, net = TextConfig(), TextClassifierConfig()
    made: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_string("vectors", how.vectors, "File of word vectors, see llm_jax/interop/word_vectors/files.py."),
        flags.DEFINE_enum("invalid", how.invalid, POLICIES, "What happens to words of --vectors that are not UTF-8."),
        flags.DEFINE_integer(
            "extra_words",
            how.extra_words,
            "Words of --vectors, the first, that are known beside those of the training texts.",
        ),
        flags.DEFINE_enum("embedding", how.embedding, EMBEDDINGS, "How --vectors are used."),
        flags.DEFINE_integer("word_dim", net.model_dim, "Width of words, where --vectors does not set it."),
        flags.DEFINE_integer("min_count", how.min_count, "Rarer words without a vector are unknown."),
        flags.DEFINE_integer("max_length", how.max_length, "Words of a text that are read, at most."),
        flags.DEFINE_integer("epochs", how.epochs, "Passes over the texts."),
        flags.DEFINE_integer("batch_size", how.batch_size, "Texts in a batch."),
        flags.DEFINE_float("learning_rate", how.learning_rate, "Adam's learning rate."),
        flags.DEFINE_integer("seed", how.seed, "Seed of parameters, order and dropout."),
        flags.DEFINE_float("dropout", net.dropout, "Dropout before the classifier."),
        flags.DEFINE_float("max_norm", net.max_norm, "Bound on the length of each class's weights; 0 is none."),
        flags.DEFINE_float("input_dropout", net.input_dropout, "Dropout on words."),
        flags.DEFINE_integer("hidden_dim", net.hidden_dim, "LSTM cells in each direction."),
        flags.DEFINE_integer("num_layers", net.num_layers, "Number of LSTM layers."),
        flags.DEFINE_enum("pooling", net.pooling, POOLINGS, "How the states of words become one."),
        flags.DEFINE_list("widths", [str(w) for w in net.widths], "Widths of filters, in words."),
        flags.DEFINE_integer("filters", net.filters, "Filters of every width."),
    ]
    return {flag.name: flag for flag in made}


def taken_by(given: Flags, kind: str) -> list[flags.FlagHolder[Any]]:
    """The flags that a kind of model takes."""
    others = CNN if kind == "lstm" else LSTM
    return [flag for name, flag in given.items() if name not in others]


def configs(
    given: Flags, kind: str, tokenize: str | None, labels: tuple[str, ...]
) -> tuple[TextClassifierConfig, TextConfig]:
    """(model, training).

    Raises:
      ValueError: for values out of range, and flags without effect.
    """
    value = {name: flag.value for name, flag in given.items()}
    vectors, projected = value["vectors"] is not None, value["embedding"] == "projected"
    for name in ("extra_words", "invalid"):
        if given[name].present and not vectors:
            raise ValueError(f"--{name} needs --vectors")
    if given["word_dim"].present and vectors and not projected:
        raise ValueError("--word_dim is the width of --vectors: leave it, or take --embedding=projected")
    if not all(w.strip().isdecimal() for w in value["widths"]):
        raise ValueError(f"--widths={','.join(value['widths'])} must be whole numbers")
    sizes = {name: value[name] for name in ("hidden_dim", "num_layers", "pooling", "filters")}
    rates = {name: value[name] for name in ("input_dropout", "dropout", "max_norm")}
    widths = tuple(map(int, value["widths"]))
    model = TextClassifierConfig(kind, model_dim=value["word_dim"], widths=widths, labels=labels, **sizes, **rates)
    names = ("epochs", "batch_size", "learning_rate", "seed", "min_count", "max_length")
    of_vectors = ("vectors", "extra_words", "invalid", "embedding")
    how: dict[str, Any] = {name: value[name] for name in (*names, *of_vectors)}
    how |= {} if tokenize is None else {"tokenize": tokenize}
    return model, TextConfig(**how)
