"""Rows of labelled examples: labels stand at their tokens, whatever the tokenizer; what is cut is counted."""

import functools
import logging

import numpy as np
import pytest

from llm_jax.data import characters, tokenizers
from llm_jax.data.corpora import CorpusError
from llm_jax.data.labeled import Example
from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows, without_text
from llm_jax.models.bert import BertConfig
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.xlnet import XLNetConfig

SENTENCE = "Unbelievable ! Ann 's cat doesn't like naïve dogs , 1 000 of them - in 日本 ."
WORDS = SENTENCE.split()
TEXTS = [SENTENCE, "a cat and a dog", "the thing is that it is believable"]
KINDS = ("wordpiece", "bpe", "unigram")


@functools.cache
def tokenizer(kind):
    return tokenizers.train(TEXTS * 20, kind, 290 if kind == "bpe" else 60, tokenizers.MASKED_SPECIAL)


def rows_of(kind, inputs, labels, names, length=32, model=None, own=None):
    model = BertConfig(vocab_size=300) if model is None else model
    encoder = Encoder.of(model, own or tokenizer("wordpiece"), kind, length)
    examples = [Example(f"f:{i}", x, y) for i, (x, y) in enumerate(zip(inputs, labels, strict=True))]
    return LabeledRows(examples, encoder, names, "part")


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_piece_of_every_word_has_its_tag(kind, left):
    """The oracle tokenizes word by word."""
    own, names = tokenizer(kind), [str(i) for i in range(len(WORDS))]
    model = XLNetConfig(vocab_size=300) if left else None
    row = rows_of("tokens", [tuple(WORDS)], [names], names, 100, model, own)[0]
    alone = [own.encode(w if kind == "wordpiece" or i == 0 else f" {w}") for i, w in enumerate(WORDS)]
    if kind == "unigram":  # which marks every word's beginning by itself
        alone = [own.encode(w) for w in WORDS]
    flat = [i for ids in alone for i in ids]
    begin = int(np.flatnonzero(row["attention_mask"])[0])
    assert begin == (100 - len(flat) - 2 if left else 0)
    np.testing.assert_array_equal(row["input_ids"][begin + 1 : begin + 1 + len(flat)], flat)
    want = np.full(100, -100)
    want[begin + 1 + np.cumsum([0, *map(len, alone[:-1])])] = np.arange(len(WORDS))
    np.testing.assert_array_equal(row["labels"], want)


def test_words_behind_the_cut_and_unknown_tags_do_not_count(caplog):
    with caplog.at_level(logging.INFO):
        rows = rows_of("tokens", [("a", "cat", "\u200b", "a"), ("a",) * 9], [list("XYXX"), list("XXXXXXXXX")], ["X"], 8)
    assert rows.unknown == 1 and rows.lost == 4 and rows.labels().tolist() == [0] * 8
    assert "part: 2 rows, 1 cut to 8 tokens, 1 unknown tags, 4 words cut or without a piece" in caplog.text


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_tokens_that_spell_them(kind, left):
    own, context = tokenizer(kind), TEXTS[0]
    model = XLNetConfig(vocab_size=300) if left else None
    answers = ["Ann", "naïve dogs", "Unbelievable", "."]
    places = [(context.index(a), context.index(a) + len(a)) for a in answers]
    rows = rows_of("span", [("a cat", context)] * 4, places, (), 100, model, own)
    for i, answer in enumerate(answers):
        first, last = rows[i]["labels"]
        assert own.decode(rows[i]["input_ids"][first : last + 1]).strip().lower().replace("ï", "i") == (
            answer.lower().replace("ï", "i")
        )


def test_spans_without_an_answer_without_room_and_behind_the_cut(caplog):
    context = "a cat and a dog"
    inputs = [("a cat", context), ("a cat " * 30, context), ("a cat", context)]
    with caplog.at_level(logging.WARNING):
        rows = rows_of("span", inputs, [None, (0, 1), (12, 15)], (), 9)
    assert len(rows) == 1 and rows[0]["labels"].tolist() == [0, 0]
    assert "skipping bad row f:1: it has no token, or too long a question for 9" in caplog.text
    assert "skipping bad row f:2: its answer stands behind the row's 9 tokens" in caplog.text
    assert rows[0]["input_ids"][-1] == tokenizer("wordpiece").role("sep")  # the question stays whole, the frame too


def test_pairs_lose_the_end_of_the_longer_text():
    own = tokenizer("wordpiece")
    row = rows_of("classification", [("a cat", "a dog " * 9)], ["x"], ["x", "y"], 12, own=own)[0]
    want = own.batch(["a cat"], ["a dog " * 9], 12)
    for name in want:
        np.testing.assert_array_equal(row[name], want[name][0])
    assert row["labels"] == 0 and row["loss_weights"].tolist() == [1]
    roberta = BertConfig(vocab_size=300, num_token_types=1, position_offset=2)
    assert "token_type_ids" not in rows_of("regression", [("a",)], [2.5], ["s"], model=roberta)[0]


def test_choices():
    rows = rows_of("choice", [("a", "cat", "a dog"), ("a", "a cat", "dog")], ["B", "A"], ["A", "B"], 8)
    row, own = rows[0], tokenizer("wordpiece")
    want = own.batch(["a", "a"], ["cat", "a dog"])
    size = want["input_ids"].shape[1]
    for name in want:
        np.testing.assert_array_equal(row[name][:, :size], want[name])
    assert row["input_ids"].shape == (2, 8) and row["labels"] == 1
    with pytest.raises(CorpusError, match="part: no row is left, 1 left out"):
        rows_of("choice", [("a", "b", "c")], ["A"], ["A", "B", "C"])


def test_unknown_labels_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        rows = rows_of("classification", [("a",), ("b",)], ["x", "z"], ["x", "y"])
    assert len(rows) == 1 and "f:1: its label 'z' is not one of x, y" in caplog.text


def test_words_spelled_between_the_ends_of_a_sentence():
    elmo = ElmoConfig(max_characters=9, head="tokens")
    own = tokenizers.blanks()
    row = rows_of("tokens", [("Über", "a,b", "c")], [["X", "Y", "X"]], ["X", "Y"], 7, elmo, own)[0]
    np.testing.assert_array_equal(row["input_ids"][:5], characters.batch([["Über", "a,b", "c"]], 9)[0])
    assert row["labels"].tolist() == [-100, 0, 1, 0, -100, -100, -100] and row["attention_mask"].sum() == 5
    cut = rows_of("classification", [("a b c d",)], ["X"], ["X", "Y"], 5, elmo, own)[0]
    with pytest.raises(ValueError, match="reads one text at a time, no pairs"):
        rows_of("classification", [("a", "b")], ["X"], ["X", "Y"], 5, elmo, own)
    np.testing.assert_array_equal(cut["input_ids"], characters.batch([["a", "b", "c"]], 9)[0])


def test_what_knows_only_the_labels():
    make = lambda kind, labels, names: rows_of(kind, [("a",)] * len(labels), labels, names)
    loss, share = without_text(make("classification", list("xxxy"), "xy"), make("classification", list("xyy"), "xy"), 2)
    p = np.array([4, 2]) / 6  # one is added to each count
    assert loss == pytest.approx(-(np.log(p[0]) + 2 * np.log(p[1])) / 3) and share == pytest.approx(1 / 3)
    loss, share = without_text(make("regression", [1.0, 3.0], ["s"]), make("regression", [2.0, 5.0], ["s"]), 1)
    assert loss == pytest.approx((0 + 9) / 2) and share == 0
