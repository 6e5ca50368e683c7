"""Rows of masked language models against hand-written ones."""

import json

import numpy as np
import pytest

from llm_jax.data import tokenizers
from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.masked import FramedRows, Frames, MaskCopies, PairRows
from llm_jax.data.tokenizers import TokenizerError
from llm_jax.data.tokens import TokenStore, unigram_loss

SEP, PAD, CLS, MASK = range(4)
SPECIAL = np.arange(60) < 4
STARTS = np.arange(60) % 2 == 0  # even entries begin words
FRAMES = Frames(CLS, SEP, PAD, SPECIAL, STARTS | SPECIAL)


def store(*documents):
    ids = np.array([i for d in documents for i in (*d, SEP)], np.uint16)
    return TokenStore(ids, np.cumsum([0, *(len(d) + 1 for d in documents)]), None, 100)


def test_full_sentences_by_hand():
    rows = FramedRows(store([10, 11, 13], [20, 22]), 5, FRAMES)
    assert len(rows) == 2
    assert [rows[i]["input_ids"].tolist() for i in (0, 1)] == [[CLS, 10, 11, 13, SEP], [CLS, SEP, 20, 22, SEP]]
    assert rows[0]["maskable"].tolist() == [0, 1, 1, 1, 0] and rows[1]["maskable"].tolist() == [0, 0, 1, 1, 0]
    assert rows[0]["words"].tolist() == [0, 1, 1, 1, 2]
    assert rows[0]["attention_mask"].tolist() == [1] * 5
    with pytest.raises(CorpusError, match="too few for one row of 9"):
        FramedRows(store([10, 11]), 9, FRAMES)


DOCUMENTS = [list(range(10, 30)), list(range(30, 50)), list(range(50, 53))]  # the last is too short


@pytest.mark.parametrize("kind", ["next", "order"])
def test_pairs(kind):
    rows = PairRows(store(*DOCUMENTS), 15, FRAMES, kind, seed=0)
    assert len(rows) == 4  # two windows of each long document
    seen = set()
    for seed in range(30):
        rows = PairRows(store(*DOCUMENTS), 15, FRAMES, kind, seed)
        for i in range(len(rows)):
            row = rows[i]
            np.testing.assert_array_equal(row["input_ids"], rows[i]["input_ids"])  # a function of the index
            real = row["attention_mask"].astype(bool)
            assert (row["input_ids"][~real] == PAD).all() and not row["maskable"][~real].any()
            assert not row["maskable"][row["input_ids"] < 4].any()
            first = row["input_ids"][real & (row["token_type_ids"] == 0)]
            second = row["input_ids"][real & (row["token_type_ids"] == 1)]
            assert first[0] == CLS and first[-1] == second[-1] == SEP
            a, b = first[1:-1], second[:-1]
            label = int(row["pair_labels"])
            seen.add(label)
            goes_on = b[0] == a[-1] + 1 if label == 0 or kind == "next" else a[0] == b[-1] + 1
            if kind == "next":
                assert goes_on == (label == 0) or (a[-1] == 29 and b[0] == 30)
                assert (a[0] < 30) == (b[0] < 30) if label == 0 else (a[0] < 30) != (b[0] < 30)
            else:
                assert goes_on
    assert seen == {0, 1}


def test_pairs_say_what_is_left_over(caplog):
    caplog.set_level("INFO")
    texts = [list(range(10, 10 + n)) for n in (7, 12, 8, 25)]
    PairRows(store(*texts), 15, FRAMES, "order", 0)  # windows of 12: 7 and 1 tokens are too few
    assert "8 tokens, 15.4 % of all, are left over in fewer than 8 and left out" in caplog.text


def test_pairs_need_text():
    with pytest.raises(CorpusError, match="two documents"):
        PairRows(store(DOCUMENTS[0]), 15, FRAMES, "next", 0)
    with pytest.raises(CorpusError, match="rows of at least 11 tokens"):
        PairRows(store(*DOCUMENTS), 10, FRAMES, "order", 0)


def test_copies_number_their_masks():
    rows = MaskCopies(FramedRows(store([10, 11, 13], [20, 22]), 5, FRAMES), 3)
    assert len(rows) == 6 and [int(rows[i]["mask_seed"]) for i in range(6)] == list(range(6))
    np.testing.assert_array_equal(rows[1]["input_ids"], rows[5]["input_ids"])


def test_frames_of_a_trained_tokenizer():
    texts = ["the richest rich man is richer than the rest"] * 3
    tokenizer = tokenizers.train(texts, "wordpiece", 60, tokenizers.MASKED_SPECIAL)
    frames = Frames.of(tokenizer)
    assert (frames.sep_id, frames.pad_id, frames.cls_id, tokenizer.role("mask")) == (0, 1, 2, 3)
    assert frames.special[:5].all() and not frames.special[5:].any()
    pieces = [tokenizer.token(i) for i in tokenizer.encode("richest")]
    assert [bool(frames.starts[i]) for i in tokenizer.encode("richest")] == [not p.startswith("##") for p in pieces]
    with pytest.raises(TokenizerError, match="has no cls, sep, pad token"):
        Frames.of(tokenizers.train(texts, "wordpiece", 60))


def test_batches_of_texts_and_pairs(tmp_path):
    texts = ["the richest rich man is richer than the rest"] * 3
    tokenizer = tokenizers.train(texts, "wordpiece", 60, tokenizers.MASKED_SPECIAL)
    a, b = tokenizer.encode("the man"), tokenizer.encode("is richer than the rest")
    one = tokenizer.batch(["the man", "is richer than the rest"])
    assert one["input_ids"].tolist() == [[CLS, *a, SEP, *[PAD] * (len(b) - len(a))], [CLS, *b, SEP]]
    assert one["attention_mask"].sum(1).tolist() == [len(a) + 2, len(b) + 2] and "token_type_ids" not in one
    two = tokenizer.batch(["the man"], ["is richer than the rest"], length=8)
    assert two["input_ids"].tolist() == [[CLS, *a, SEP, *b[: 5 - len(a)], SEP]]  # the longer text lost its end
    assert two["token_type_ids"].sum() == 6 - len(a)
    tokenizer.token_types = False
    assert "token_type_ids" not in tokenizer.batch(["the man"], ["is"])
    with pytest.raises(TokenizerError, match="1 texts and 0 second ones make no batch"):
        tokenizer.batch(["the man"], [])
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["mask_token"], saved["cls_token"], saved["pad_token"], saved["unk_token"]) == (
        "[MASK]", "[CLS]", "[PAD]", "[UNK]",
    )  # fmt: skip
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]


def test_unigram_loss_by_hand():
    train, held = store([10, 10, 11]), store([10, 12])
    p = (np.bincount(train.ids, minlength=20) + 1) / 24
    assert unigram_loss(train, held, 20) == pytest.approx(-np.log(p[[10, 12, SEP]]).mean())
