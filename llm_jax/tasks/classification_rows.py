"""What a text classifier is trained on: texts as rows of words, and the words' vectors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.classic.text.sentences import POLICIES
from llm_jax.classic.text.vocabulary import SPECIAL, UNKNOWN, Words, count
from llm_jax.classic.vectors.project import Coverage, embed
from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors
from llm_jax.interop.word_vectors import files

EMBEDDINGS = ("trained", "frozen", "projected", "both")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How a text classifier is trained. Kim 2014 takes batches of 50 and Adadelta; here it is Adam.

    Attributes:
      epochs: times through the texts.
      batch_size: texts a step.
      learning_rate: of Adam, the same all the time.
      seed: of initialisation, order and dropout.
      tokenize: one of `classic.text.document_terms.TOKENIZERS`.
      min_count: words that are rarer in the training texts and have no vector are unknown.
      max_length: words of a text at most; of longer ones the beginning is read.
      vectors: file of pre-trained word vectors, None for none.
      extra_words: so many words of that file, the first ones, are known beside those of the training texts.
      invalid: what becomes of its words that are not UTF-8, see `interop.word_vectors.files.read`.
      embedding: what becomes of the vectors: `trained` further, `frozen`, `projected`: frozen under a linear layer that
        is trained, or `both` of the first two, side by side (Kim's two channels).
    """

    epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 1e-3
    seed: int = 0
    tokenize: str = "treebank"
    min_count: int = 2
    max_length: int = 400
    vectors: str | None = None
    extra_words: int = 50_000
    invalid: str = "strict"
    embedding: str = "trained"

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        for name in ("epochs", "batch_size", "min_count", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("extra_words", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be a positive number")
        if self.invalid not in POLICIES:
            raise ValueError(f"invalid={self.invalid!r} is not one of {', '.join(POLICIES)}")
        if self.embedding not in EMBEDDINGS:
            raise ValueError(f"embedding={self.embedding!r} is not one of {', '.join(EMBEDDINGS)}")
        if self.embedding != "trained" and self.vectors is None:
            raise ValueError(f"embedding={self.embedding!r} is of pre-trained vectors: give vectors")


class WordTable(NamedTuple):
    """Words of a run as rows of a table.

    Attributes:
      words: the vocabulary.
      table: rows of the words, float32 `[V, E]`, None where they are drawn.
      coverage: of the training texts' words by pre-trained vectors, None without.
    """

    words: Words
    table: np.ndarray | None
    coverage: Coverage | None

    def describe(self) -> str:
        """One line: words, and how many have a vector."""
        line = f"{len(self.words) - len(SPECIAL):,} words are known"
        if self.coverage is None or self.coverage.occurrences is None:
            return line
        found = f"{self.coverage.found:,} of {self.coverage.words:,} words trained on have a vector"
        return f"{line}; {found}, {self.coverage.occurrences:.1%} of the text"


def word_table(texts: Sequence[str], config: TextConfig) -> WordTable:
    """The vocabulary of training texts, and their vectors; an unknown word begins as the mean of all.

    Raises:
      WordsError, VectorsError: for texts without words, files without vectors for them.
    """
    counts = count(texts, config.tokenize)
    often = [w for w, n in counts.most_common() if n >= config.min_count]
    if config.vectors is None:
        return WordTable(Words(often, config.tokenize), None, None)

    def read(**which: Any) -> dict[str, np.ndarray]:
        return dict(zip(*files.read(config.vectors, **which, invalid=config.invalid), strict=True))

    found = read(keep={x for w in counts for x in (w, w.lower())})
    rest = read(limit=config.extra_words) if config.extra_words else {}
    if not found:
        raise VectorsError(f"{config.vectors} holds none of the {len(counts):,} words of the training texts")
    both = {**found, **rest}
    given = WordVectors(list(both), np.stack(list(both.values())))
    words = Words([*often, *(w for w in counts if w in found), *rest], config.tokenize)
    rng = np.random.default_rng(config.seed)
    seen = list(counts)
    _, coverage = embed(seen, given, rng, [counts[w] for w in seen])
    table, _ = embed(words.words[len(SPECIAL) :], given, rng)
    special = np.zeros((len(SPECIAL), table.shape[1]), np.float32)
    special[UNKNOWN] = table.mean(0)
    return WordTable(words, np.concatenate([special, table]), coverage)


class Texts:
    """Row i holds a text's words and its class, as `objectives.Labels` reads them."""

    def __init__(self, ids: np.ndarray, classes: np.ndarray) -> None:
        """`ids` int32 `[N, T]`, `classes` `[N]`."""
        self.ids, self.classes = ids, np.asarray(classes, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask` `[T]`, `labels`, and `loss_weights` `[1]`."""
        ids = self.ids[int(index)]
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).astype(np.int32),
            "labels": self.classes[int(index)],
            "loss_weights": np.ones(1, np.float32),
        }
