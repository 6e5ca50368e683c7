"""The binary of vectors from counts: both methods, files in the place of memory, and what it refuses."""

import numpy as np
import pytest
from binaries import call

from llm_jax.classic.text import sentences
from llm_jax.classic.vectors import co_occurrence, glove
from llm_jax.classic.vectors.co_occurrence import CountsError
from llm_jax.interop.word_vectors import files

TOPICS = (["red", "green", "blue", "black", "white"], ["cat", "dog", "cow", "horse", "sheep"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "topics.txt"
    path.write_text("\n".join([" ".join(rng.choice(TOPICS[i % 2], 6)) for i in range(200)] + ["rare"]))
    return path


def run(corpus, out, *arguments):
    call("count_vectors", f"--corpus={corpus}", f"--out={out}", *arguments)
    return files.read(out)


def test_svd(corpus, tmp_path, capsys):
    """The library's steps, and the same through files."""
    words, table = run(corpus, tmp_path / "a.txt", "--size=3", "--shift=0.5", "--exponent=1", "--weighting=flat")
    vocabulary, text = sentences.read(sentences.Reader([corpus]), min_count=5)
    found = co_occurrence.cooccurrences(text, len(vocabulary), 5)[3:, 3:]
    expected = co_occurrence.svd_vectors(co_occurrence.ppmi(found, 0.5, 0.75), 3, 1.0)
    assert words == vocabulary.words[3:] and set(words) == {*TOPICS[0], *TOPICS[1]}
    np.testing.assert_allclose(table, expected, rtol=1e-6, atol=1e-6)
    assert "10 words, 50 pairs" in capsys.readouterr().out
    streamed = run(
        corpus, tmp_path / "b.bin", "--size=3", "--shift=0.5", "--exponent=1", "--weighting=flat",
        f"--scratch={tmp_path}", "--format=word2vec_binary",
    )  # fmt: skip
    assert streamed[0] == words
    np.testing.assert_allclose(streamed[1], table, rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_glove(corpus, tmp_path, capsys, monkeypatch):
    seen = {}
    train = glove.train
    monkeypatch.setattr(glove, "train", lambda found, *a, **kw: seen.update(found=found) or train(found, *a, **kw))
    words, table = run(corpus, tmp_path / "g.txt", "--method=glove", "--size=4", "--epochs=3", "--x_max=10")
    assert table.shape == (10, 4) and "in the last" in capsys.readouterr().out
    vocabulary, text = sentences.read(sentences.Reader([corpus]), min_count=5)
    expected = co_occurrence.cooccurrences(text, len(vocabulary), 5, "harmonic")[3:, 3:]
    np.testing.assert_allclose(seen["found"].toarray(), expected.toarray())


BAD = [
    (("--method=glove", "--shift=2"), ValueError, "--shift needs --method=svd, not glove"),
    (("--epochs=2",), ValueError, "--epochs needs --method=glove, not svd"),
    (("--window=0",), CountsError, "window=0 must be at least 1 word"),
    (("--size=10",), CountsError, "dim=10 must be at least 1 and below both sides"),
    (("--min_count=9999",), sentences.TextError, "no word occurs min_count=9999 times"),
    (("--scratch=none",), FileNotFoundError, "none"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(corpus, tmp_path, arguments, error, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(corpus, tmp_path / "x.txt", *arguments)
    assert not (tmp_path / "x.txt").exists()
