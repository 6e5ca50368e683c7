"""Pairs from tables: read, held out by group, encoded, and cut into rows."""

import gzip
import json

import numpy as np
import pytest

from llm_jax.data import corpora, tokenizers, tokens
from llm_jax.data.rows.pairs import PairedRows, encode_pairs

FIELDS = ("en", "es")


def write(folder, rows, name="verses.tsv.gz"):
    lines = ["index\ten\tes\tref", *("\t".join((str(i), *row)) for i, row in enumerate(rows))]
    (folder / name).write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return str(folder / name)


ROWS = [(f"the word {i} of many", f"la palabra {i}", f"Gen.{i // 5}.{i}") for i in range(60)]


@pytest.fixture
def tokenizer():
    return tokenizers.train((text for row in ROWS for text in row[:2]), "bpe", 300)


def test_a_table_is_read_by_its_first_line(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\r\nhello there\tx\r\ntoo\tmany\tfields\r\n\r\n")
    bad = corpora.BadRows()
    found = list(corpora.documents(str(tmp_path), bad))
    assert [(d.text, d.record) for d in found] == [("hello there", {"text": "hello there", "label": "x"})]
    assert bad.count == 1


def test_groups_are_held_out_whole(tmp_path):
    read = lambda group: list(corpora.documents(write(tmp_path, ROWS), group=group))
    splits = {}
    for document in read(r"ref:\w+\.\d+"):
        splits.setdefault(document.group, set()).add(corpora.split_of(document, 0.4))
    assert len(splits) == 12 and all(len(s) == 1 for s in splits.values())
    assert {next(iter(s)) for s in splits.values()} == {"train", "validation"}
    assert {d.group for d in read("ref")} == {row[2] for row in ROWS}
    assert {d.group for d in read(None)} == {None}
    with pytest.raises(corpora.CorpusError, match="has no field 'chapter', which data.group names"):
        read("chapter")
    with pytest.raises(corpora.CorpusError, match=r"'Gen.0.0' does not match '\^x' of data.group"):
        read("ref:^x")


def test_rows_hold_source_and_labels(tmp_path, tokenizer):
    source = write(tmp_path, ROWS)
    store = tokens.build(source, tokenizer, tmp_path / "cache", encode=encode_pairs(tokenizer, FIELDS))["train"]
    rows = PairedRows(store, 16)
    assert len(rows) == 60 and rows.dropped == 0
    row = rows[7]
    n = row["attention_mask"].sum()
    assert tokenizer.decode(row["input_ids"][:n]) == ROWS[7][0] and row["input_ids"][n - 1] == tokenizer.eos_id
    labels = row["labels"][row["labels"] >= 0]
    assert tokenizer.decode(labels) == ROWS[7][1] and labels[-1] == tokenizer.eos_id
    assert (row["labels"][len(labels) :] == -100).all()


def test_pairs_that_do_not_fit_are_left_out(tmp_path, tokenizer):
    long = [(" ".join(["word"] * 40), "la", "Gen.1.1"), ("the", " ".join(["palabra"] * 40), "Gen.1.2")]
    store = tokens.build(
        write(tmp_path, ROWS + long), tokenizer, tmp_path / "cache", encode=encode_pairs(tokenizer, FIELDS)
    )["train"]
    rows = PairedRows(store, 16)
    assert (len(rows), rows.dropped) == (60, 2)
    with pytest.raises(corpora.CorpusError, match="no pair has at most 2 tokens a side"):
        PairedRows(store, 2)


def test_rows_without_both_texts_are_counted(tmp_path, tokenizer, caplog):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in ({"en": "a", "es": "b"}, {"en": "a"}, {})))
    store = tokens.build(
        str(tmp_path / "p.jsonl"), tokenizer, tmp_path / "cache", encode=encode_pairs(tokenizer, FIELDS)
    )["train"]
    assert len(store.starts) == 2 and "2 bad rows skipped" in caplog.text
    plain = store._replace(weights=None)
    with pytest.raises(corpora.CorpusError, match="the corpus holds no pairs: set data.fields"):
        PairedRows(plain, 8)


def test_the_bible_of_the_shared_data(shared_data):
    source = str(shared_data / "bible_en_es" / "kjv_rv1909.tsv.gz")
    found = list(corpora.documents(source, group=r"ref:\w+\.\d+"))
    assert len(found) == 30687 and found[0].group == "Gen.1"
    held = {d.group for d in found if corpora.split_of(d, 0.03) == "validation"}
    assert 0.01 < len(held) / len({d.group for d in found}) < 0.06
    assert np.mean([corpora.split_of(d, 0.03) == "validation" for d in found]) < 0.06
