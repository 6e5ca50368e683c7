"""What a text classifier knows of its words before it trains."""

import numpy as np
import pytest

from llm_jax.classic.vectors.word_vectors import VectorsError
from llm_jax.interop.word_vectors import files
from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.tasks.classification import sized
from llm_jax.tasks.classification_rows import TextConfig, Texts, word_table

TEXTS = ["the cat saw", "the cat", "the Emu !"]
WORDS, MATRIX = ["of", "the", "emu", "cat", "rare"], np.arange(1, 16, dtype=np.float32).reshape(5, 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "vectors.txt"
    files.write(file, WORDS, MATRIX)
    return str(file)


def test_words_and_their_vectors(path):
    known = word_table(TEXTS, TextConfig(vectors=path, extra_words=2))
    assert known.words.words == ["<pad>", "<unk>", "the", "cat", "emu", "of"]  # frequent, with a vector, first in file
    np.testing.assert_array_equal(known.table[2:], MATRIX[[1, 3, 2, 0]])
    np.testing.assert_allclose(known.table[:2], [[0, 0, 0], MATRIX[:4].mean(0)])
    assert known.coverage[:3] == (3, 0, 5) and known.coverage.occurrences == 6 / 8
    assert known.describe() == "4 words are known; 3 of 5 words trained on have a vector, 75.0% of the text"
    cased = word_table(TEXTS, TextConfig(vectors=path, extra_words=0, tokenize="blanks", min_count=1))
    assert cased.words.words[2:] == ["the", "cat", "saw", "Emu", "!"] and cased.coverage[:2] == (2, 1)
    np.testing.assert_array_equal(cased.table[5], MATRIX[2])


def test_words_without_vectors():
    known = word_table(TEXTS, TextConfig())
    assert known.words.words[2:] == ["the", "cat"] and known.table is None and known.coverage is None
    assert known.describe() == "2 words are known"


@pytest.mark.parametrize("embedding, sizes", [("trained", (3, None)), ("frozen", (3, None)), ("projected", (7, 3))])
def test_the_model_fits_its_vectors(path, embedding, sizes):
    known = word_table(TEXTS, TextConfig(vectors=path, embedding=embedding))
    model = sized(TextClassifierConfig(model_dim=7), known, embedding)
    assert (model.model_dim, model.embedding_dim) == sizes and model.vocab_size == len(known.words)


def test_rows():
    row = Texts(np.array([[3, 2, 0]], np.int32), np.array([1]))[0]
    assert row["attention_mask"].tolist() == [1, 1, 0] and row["labels"] == 1 and row["loss_weights"].tolist() == [1]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(epochs=0), "epochs=0 must be at least 1"),
        (dict(extra_words=-1), "extra_words=-1 must not be negative"),
        (dict(learning_rate=float("nan")), "learning_rate=nan must be a positive number"),
        (dict(embedding="fixed"), "embedding='fixed' is not one of trained, frozen, projected"),
        (dict(embedding="frozen"), "embedding='frozen' is of pre-trained vectors"),
    ],
)
def test_bad_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        TextConfig(**changes)


def test_vectors_of_other_words(path):
    with pytest.raises(VectorsError, match="holds none of the 1 words of the training texts"):
        word_table(["oiseau"], TextConfig(vectors=path))
