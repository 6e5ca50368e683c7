"""Counting through files equals counting in memory, in any blocks, with several processes."""

import numpy as np
import pytest
from letters import TEXT

from llm_jax.classic import counting, sentences, smoothing, streaming


@pytest.mark.parametrize("block, span, workers", [(40, 2, 1), (40, 1 << 22, 1), (1 << 23, 8, 1), (40, 4, 2)])
def test_equals_counting_in_memory(tmp_path, monkeypatch, block, span, workers):
    monkeypatch.setattr(sentences, "BLOCK", block)
    monkeypatch.setattr(streaming, "RANGE", span)
    monkeypatch.setattr(streaming, "SAMPLE", 2)
    (tmp_path / "text.txt").write_text("\n" + TEXT * 3)
    reader = sentences.Reader([tmp_path / "text.txt"])
    vocabulary, text = sentences.read(reader, min_count=4)
    want = counting.count(text, len(vocabulary), 4)
    again, ends = streaming.write_text(reader, tmp_path, min_count=4)
    assert again.words == vocabulary.words and (len(ends) > 2) == (block == 40)
    got = streaming.count(tmp_path, len(vocabulary), 4, ends, workers)
    for name in ("keys", "counts", "suffixes"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            np.testing.assert_array_equal(a, b)
    ours, theirs = (smoothing.estimate(c, vocabulary, "witten_bell") for c in (got, want))
    np.testing.assert_array_equal(ours.log_prob(text), theirs.log_prob(text))


def test_orders_without_n_grams(tmp_path):
    (tmp_path / "text.txt").write_text("a\n")
    vocabulary, ends = streaming.write_text(sentences.Reader([tmp_path / "text.txt"]), tmp_path)
    counts = streaming.count(tmp_path, len(vocabulary), 5, ends)
    assert [len(k) for k in counts.keys] == [4, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="order=0 must be at least 1"):
        streaming.count(tmp_path, len(vocabulary), 0, ends)
