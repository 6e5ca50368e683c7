"""Counting through files equals counting in memory, in any blocks, with several processes."""

import os
import warnings

import numpy as np
import pytest
from letters import TEXT

from llm_jax.classic.ngrams import counting, smoothing, streaming
from llm_jax.classic.text import sentences
from llm_jax.storage import digests


@pytest.mark.parametrize("block, span, workers", [(40, 2, 1), (40, 1 << 22, 1), (1 << 23, 8, 1), (40, 4, 2)])
def test_equals_counting_in_memory(tmp_path, block, span, workers):
    (tmp_path / "text.txt").write_text("\n" + TEXT * 3)
    reader = sentences.Reader([tmp_path / "text.txt"], block=block)
    vocabulary, text = sentences.read(reader, min_count=4)
    want = counting.count(text, len(vocabulary), 4)
    again, ends = streaming.write_text(reader, tmp_path, min_count=4)
    assert again.words == vocabulary.words and (len(ends) > 2) == (block == 40)
    got = streaming.count(tmp_path, len(vocabulary), 4, ends, workers, ranges=streaming.Merge(span, 2))
    for name in ("keys", "counts", "suffixes"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            np.testing.assert_array_equal(a, b)
    ours, theirs = (smoothing.estimate(c, vocabulary, "witten_bell") for c in (got, want))
    np.testing.assert_array_equal(ours.log_prob(text), theirs.log_prob(text))


def test_a_given_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_text("\n" + TEXT * 3 + "unheard of")
    reader, vocabulary = sentences.Reader([tmp_path / "text.txt"], block=40), sentences.Vocabulary([*"zyxabcde", "of"])
    text = sentences.read(reader, vocabulary)[1]
    again, ends = streaming.write_text(reader, tmp_path, vocabulary)
    assert again is vocabulary and len(ends) > 2
    np.testing.assert_array_equal(np.fromfile(tmp_path / "text", np.int32), text)
    (tmp_path / "text.txt").write_text("\n\n")
    for read in (
        lambda: sentences.read(reader, vocabulary),
        lambda: streaming.write_text(reader, tmp_path, vocabulary),
    ):
        (tmp_path / streaming.WRITTEN).unlink(missing_ok=True)
        with pytest.raises(sentences.TextError, match="no word in the corpus"):
            read()


def test_orders_without_n_grams(tmp_path):
    (tmp_path / "text.txt").write_text("a\n")
    vocabulary, ends = streaming.write_text(sentences.Reader([tmp_path / "text.txt"]), tmp_path)
    counts = streaming.count(tmp_path, len(vocabulary), 5, ends)
    assert [len(k) for k in counts.keys] == [4, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="order=0 must be at least 1"):
        streaming.count(tmp_path, len(vocabulary), 0, ends)


def test_what_was_done_is_taken_again(tmp_path, monkeypatch):
    """Stopped at every step in turn, with runs cut short; and a longer order goes on from a shorter one."""
    (tmp_path / "text.txt").write_text(TEXT * 3)
    reader = sentences.Reader([tmp_path / "text.txt"], block=40)
    vocabulary, text = sentences.read(reader)
    want = counting.count(text, len(vocabulary), 4)
    steps = {name: getattr(streaming, name) for name in ("_sort", "_place", "_merge_runs", "_finish")}
    left = [0]

    def stopping(step):
        def run(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return step(*arguments)

        return run

    for name, step in steps.items():
        monkeypatch.setattr(streaming, name, stopping(step))
    stops, stop = 0, 1
    while True:
        left[0], stop = stop, stop + 3
        again, ends = streaming.write_text(reader, tmp_path)
        (tmp_path / "part_0").write_bytes(b"cut")
        try:
            streaming.count(tmp_path, len(vocabulary), 3, ends)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 4 and again.words == vocabulary.words
    left[0] = -1
    got = streaming.count(tmp_path, len(vocabulary), 4, ends)
    for name in ("keys", "counts", "suffixes"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_was_counted_of_a_replaced_text_is_not_taken_again(tmp_path):
    """Whatever the other text keeps: its name, its size, its time."""
    path, folders = tmp_path / "text.txt", []
    for text in (TEXT, TEXT[::-1], None):
        times = path.stat().st_mtime_ns if path.exists() else 0
        if text is not None:
            path.write_text(text)
            os.utime(path, ns=(times, times))
            digests.settle(path)
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(KeyboardInterrupt),
            streaming.resumable(tmp_path / "scratch", sentences.Reader([path])) as folder,
        ):
            folders.append(folder)
            raise KeyboardInterrupt
    assert folders[0] != folders[1] == folders[2]
