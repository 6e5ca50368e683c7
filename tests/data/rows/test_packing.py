"""Rows against hand-written ones, and counts of every token over many random corpora."""

import numpy as np
import pytest

from llm_jax.data.corpora import CorpusError
from llm_jax.data.rows.packing import StreamRows, WholeRows
from llm_jax.data.tokens import TokenStore


def store(lengths, weights=None):
    """Documents of consecutive ids from 1 on, so that every token is its own position plus one."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(1, starts[-1] + 1, dtype=np.uint16)
    return TokenStore(ids, starts, None if weights is None else np.asarray(weights, np.uint8), int(starts[-1]))


def rows_of(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("seed", range(5))
def test_stream_labels_every_token_once(seed):
    rng = np.random.default_rng(seed)
    for length in (1, 2, 3, 7):
        tokens = store(rng.integers(0, 9, 12).tolist() + [8])
        rows = rows_of(StreamRows(tokens, length))
        assert all(r["input_ids"].shape == (length + 1,) and r["input_ids"].dtype == np.int32 for r in rows)
        labels = np.concatenate([r["input_ids"][1:] for r in rows])
        whole = (len(tokens.ids) - 1) // length * length  # what does not fill a row is left out
        np.testing.assert_array_equal(labels, tokens.ids[1 : whole + 1])
        inputs = np.concatenate([r["input_ids"][:-1] for r in rows])
        np.testing.assert_array_equal(inputs, tokens.ids[:whole])


def test_stream_segments_and_weights_by_hand():
    tokens = store([3, 2, 4, 1], weights=[0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    rows = rows_of(StreamRows(tokens, 3, segments=True))
    assert [r["input_ids"].tolist() for r in rows] == [[1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, 10]]
    assert [r["segment_ids"].tolist() for r in rows] == [[1, 1, 1, 2], [1, 1, 2, 2], [1, 1, 1, 2]]
    assert [r["loss_weights"].tolist() for r in rows] == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert set(StreamRows(store([9]), 3)[0]) == {"input_ids"}


def test_whole_documents_by_hand(caplog):
    caplog.set_level("INFO")
    rows = WholeRows(store([2, 1, 2, 3, 6, 2]), 3)
    assert len(rows) == 4 and (rows.truncated, rows.cut_tokens, rows.dropped) == (1, 2, 1)
    said = "1 of 6 documents are longer than a row of 3 + 1 tokens and are cut: 2 tokens, 12.5 % of all, are lost"
    assert said in caplog.text and "1 of 6 documents have fewer than two tokens and are left out" in caplog.text
    caplog.clear()
    WholeRows(store([2, 4]), 3)
    assert not caplog.text
    assert [r["input_ids"].tolist() for r in rows_of(rows)] == [[1, 2, 4, 5], [6, 7, 8, 0], [9, 10, 11, 12],
                                                                [15, 16, 0, 0]]  # fmt: skip
    assert [r["segment_ids"].tolist() for r in rows_of(rows)] == [[1, 1, 2, 2], [1, 1, 1, 0], [1] * 4, [1, 1, 0, 0]]
    assert [r["loss_weights"].tolist() for r in rows_of(rows)] == [[1] * 4, [1, 1, 1, 0], [1] * 4, [1, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_whole_documents_stay_whole(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 14, 30)
    weights = rng.integers(0, 2, lengths.sum())
    tokens = store(lengths, weights)
    source = WholeRows(tokens, 8)
    found = []
    for row in rows_of(source):
        ids, segments = row["input_ids"], row["segment_ids"]
        assert ids.shape == segments.shape == row["loss_weights"].shape == (9,)
        assert not ids[segments == 0].any() and not row["loss_weights"][segments == 0].any()
        found += [ids[segments == s].tolist() for s in range(1, segments.max() + 1)]
        np.testing.assert_array_equal(row["loss_weights"], np.where(ids, weights[ids - 1], 0))
    documents = [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts, tokens.starts[1:], strict=False)]
    assert found == [d[:9] for d in documents if len(d) > 1]
    assert source.truncated == sum(len(d) > 9 for d in documents)
    assert source.cut_tokens == sum(len(d[9:]) for d in documents)


def test_too_little_text():
    assert len(StreamRows(store([4]), 3)) == 1
    with pytest.raises(CorpusError, match="3 tokens are too few for one row of 3"):
        StreamRows(store([2, 1]), 3)
    with pytest.raises(CorpusError, match="no document of at least two tokens"):
        WholeRows(store([1, 0, 1]), 3)
