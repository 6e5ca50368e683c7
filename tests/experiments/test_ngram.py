"""The n-gram binary: trains, scores, goes on, draws; and what it refuses."""

import fcntl
import gzip
import json
import os
import signal

import numpy as np
import pytest
from binaries import binary, call
from letters import TEXT

from experiments import cli
from llm_jax.classic.ngrams import arpa, streaming
from llm_jax.classic.text import sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ngram")
    for i in range(3):
        (path / f"{i}.txt").write_text(TEXT)
    with gzip.open(path / "3.txt.gz", "wt") as f:
        f.write("a b a b\n")
    call("ngram", "train", f"--corpus={path}/*.txt*", f"--out={path}/model.arpa", "--smoothing=witten_bell")
    return path


def test_scores_lines(folder, capsys):
    (folder / "lines").write_text("a b\n\nz a\n")
    call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/lines", f"--json={folder}/scores.json")
    scores = json.loads((folder / "scores.json").read_text())
    assert [(r["tokens"], r["unknown"]) for r in scores["lines"]] == [(2, 0), (0, 0), (2, 1)]
    model = arpa.read(folder / "model.arpa")
    log_p = [model.log_prob(model.vocabulary.encode(line.split())) for line in ("a b", "", "z a")]
    assert [r["log10_probability"] for r in scores["lines"]] == pytest.approx([p.sum() for p in log_p])
    assert scores["perplexity"] == pytest.approx(10 ** -(sum(p.sum() for p in log_p) / 7))
    assert scores["sentences"] == 3 and "1 unknown" in capsys.readouterr().out


def test_next_and_samples(folder, capsys):
    call("ngram", "next", f"--model={folder}/model.arpa", "--after=a b", f"--json={folder}/next.json", "--top=20")
    found = json.loads((folder / "next.json").read_text())["next"]
    assert sum(row["probability"] for row in found) == pytest.approx(1, abs=1e-5)
    capsys.readouterr()
    for _ in range(2):
        call("ngram", "sample", f"--model={folder}/model.arpa", "--after=a b", "--count=3", "--seed=1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == lines[3:] and all(line.startswith("a b") for line in lines)


def test_counts_through_files(folder):
    corpus, out = f"--corpus={folder}/*.txt*", f"--out={folder}/streamed.arpa"
    call("ngram", "train", corpus, out, "--smoothing=witten_bell", f"--scratch={folder}/scratch", "--workers=2")
    assert (folder / "streamed.arpa").read_bytes() == (folder / "model.arpa").read_bytes()
    assert not list((folder / "scratch").iterdir())


def test_add_k_and_interpolated(folder, capsys):
    corpus = f"--corpus={folder}/*.txt*"
    call("ngram", "train", corpus, f"--out={folder}/add_k", "--smoothing=add_k", "--k=0.1")
    call("ngram", "train", corpus, f"--out={folder}/mixed", "--smoothing=interpolated", "--order=2")
    (folder / "lines").write_text(TEXT)
    for name in ("add_k", "mixed"):
        call("ngram", "score", f"--model={folder}/{name}", f"--text={folder}/lines", f"--json={folder}/{name}.json")
        assert np.isfinite(json.loads((folder / f"{name}.json").read_text())["perplexity"])


def test_what_is_unknown_is_said(folder, capsys):
    (folder / "words").write_text("a\nb\n")
    corpus, out = f"--corpus={folder}/0.txt", f"--out={folder}/ab.arpa"
    call("ngram", "train", corpus, out, f"--vocabulary={folder}/words", "--smoothing=witten_bell")
    assert "38 words, 15 of them unknown (39.47%)" in capsys.readouterr().out
    (folder / "words").write_text("the 500\nof 300\n")
    with pytest.raises(ValueError, match="words:1: expected a word a line, without counts or blanks, not 'the 500'"):
        call("ngram", "train", corpus, out, f"--vocabulary={folder}/words")
    (folder / "words").write_text("x\n")
    with pytest.raises(ValueError, match="none of the corpus's 38 words is in --vocabulary"):
        call("ngram", "train", corpus, out, f"--vocabulary={folder}/words")


def test_outputs_are_checked_before_the_work(folder, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work began")

    (folder / "file").write_text("")
    monkeypatch.setattr(sentences, "read", work)
    with pytest.raises(ValueError, match="--out=.*/file/x.arpa cannot be written"):
        call("ngram", "train", f"--corpus={folder}/0.txt", f"--out={folder}/file/x.arpa")
    with pytest.raises(ValueError, match="--out=.*/file cannot be written"):
        call("ngram", "train", f"--corpus={folder}/0.txt", f"--out={folder}/file")
    with pytest.raises(ValueError, match="--json=.*/file/x cannot be written"):
        call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/0.txt", f"--json={folder}/file/x")
    with pytest.raises(ValueError, match="it is a folder"):
        call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/0.txt", f"--json={folder}")


def test_folders_of_outputs_are_made(folder):
    out = folder / "new" / "scores.json"
    call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/0.txt", f"--json={out}")
    assert json.loads(out.read_text())["sentences"] == 10


def test_interrupted_counting_goes_on(folder, monkeypatch, capsys):
    """SIGTERM within the third order: what was done is not done again, and the model is the same."""
    before, sort, done = signal.getsignal(signal.SIGTERM), streaming._sort, []
    corpus, scratch = f"--corpus={folder}/*.txt*", f"--scratch={folder}/left"
    arguments = (corpus, scratch, f"--out={folder}/resumed.arpa", "--smoothing=witten_bell")

    def sorts(path, n, size, block):
        if n == 2 and not {2, "again"} & set(done):
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(n)
        return sort(path, n, size, block)

    monkeypatch.setattr(streaming, "_sort", sorts)
    with pytest.raises(KeyboardInterrupt, match="terminated; the same command goes on with what is in .*/left/ngrams_"):
        call("ngram", "train", *arguments)
    assert signal.getsignal(signal.SIGTERM) == before and len(list((folder / "left").iterdir())) == 1
    done.append("again")
    monkeypatch.setattr(sentences.Reader, "blocks", None)  # the text is not read again
    call("ngram", "train", *arguments)
    assert "going on with what is in" in capsys.readouterr().out
    assert done == [1] * 4 + ["again"] + [2] * 4  # a block for every file
    assert (folder / "resumed.arpa").read_bytes() == (folder / "model.arpa").read_bytes()
    assert not list((folder / "left").iterdir())


def test_other_flags_do_not_go_on(folder, monkeypatch, capsys):
    arguments = (f"--corpus={folder}/0.txt", f"--scratch={folder}/two", f"--out={folder}/other.arpa", "--smoothing=mle")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "count", interrupt)
        with pytest.raises(KeyboardInterrupt, match="interrupted; the same command"):
            call("ngram", "train", *arguments)
    left = list((folder / "two").iterdir())
    call("ngram", "train", *arguments, "--min_count=2")
    said = capsys.readouterr()
    assert "is of another corpus or other options" in said.out and not said.err
    assert list((folder / "two").iterdir()) == left
    assert "h" not in arpa.read(folder / "other.arpa").vocabulary.words
    (left[0] / "lock").write_text("")
    with open(left[0] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process counts in"):
            call("ngram", "train", *arguments)


def test_interpolation_says_what_it_does_not_count(folder, capsys):
    (folder / "long").write_text(TEXT + "a b z\n" + "c a b\n" * 8 + "a y\n")
    arguments = (f"--corpus={folder}/long", f"--out={folder}/mixed.arpa", "--smoothing=interpolated")
    call("ngram", "train", *arguments)
    assert "the last 2 sentences, 5 words, set the weights and are not counted" in capsys.readouterr().out
    words = arpa.read(folder / "mixed.arpa").vocabulary.words
    assert "z" in words and "y" not in words  # which the weights met as unknown
    call(
        "ngram",
        "train",
        f"--corpus={folder}/long",
        f"--out={folder}/mixed.arpa",
        "--smoothing=interpolated",
        "--closed",
    )
    assert "y" in arpa.read(folder / "mixed.arpa").vocabulary.words


def test_scores_that_are_no_probabilities(folder, capsys):
    out = f"--out={folder}/stupid.arpa"
    call("ngram", "train", f"--corpus={folder}/*.txt", out, "--smoothing=stupid_backoff")
    assert "warning: scores that do not sum to one" in capsys.readouterr().out
    (folder / "lines").write_text("a z\n")
    call("ngram", "score", f"--model={folder}/stupid.arpa", f"--text={folder}/lines", f"--json={folder}/stupid.json")
    said = capsys.readouterr().out
    assert "warning: scores that do not sum to one" in said
    assert "warning: 1 words or ends have no probability here, so the perplexity is infinite" in said
    assert json.loads((folder / "stupid.json").read_text())["perplexity"] is None
    call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/lines")
    assert "warning" not in capsys.readouterr().out


def test_bars_where_somebody_looks(folder, monkeypatch, capfd):
    def run():
        call("ngram", "train", f"--corpus={folder}/0.txt", f"--out={folder}/bars.arpa", "--smoothing=witten_bell")
        call("ngram", "score", f"--model={folder}/bars.arpa", f"--text={folder}/0.txt")
        return capfd.readouterr().err

    assert run() == ""
    monkeypatch.setattr(os, "isatty", lambda _: True)
    said = run()
    for what in ("counting: 100%", "estimating: 100%", "writing: 100%", "reading: 100%", "scoring: 100%"):
        assert what in said, said


def test_many_words_are_scored_by_hash_tables(folder):
    """As they are line by line."""
    (folder / "much").write_text((TEXT + "z a\n") * 30)
    call("ngram", "score", f"--model={folder}/model.arpa", f"--text={folder}/much", f"--json={folder}/much.json")
    model = arpa.read(folder / "model.arpa")
    want = [model.log_prob(model.vocabulary.encode(line.split())).sum() for line in [*TEXT.splitlines(), "z a"] * 30]
    got = [r["log10_probability"] for r in json.loads((folder / "much.json").read_text())["lines"]]
    assert len(want) * 4 > sum(map(len, model.keys))
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--corpus=gone.txt", "--out=x.arpa"), "gone.txt is not a file"),
        (("--corpus=gone.txt",), "--out is missing"),
        (("--corpus=gone.txt", "--out=x.arpa", "--smoothing=add_k"), "give --out a folder's name"),
        (("--corpus=gone.txt", "--out=x.arpa", "--k=2"), "--k needs --smoothing=add_k"),
        (("--corpus=gone.txt", "--out=x.arpa", "--workers=2"), "set --scratch to a folder"),
        (("--corpus=x", "--out=x.arpa", "--scratch=x", "--smoothing=interpolated"), "with --scratch needs --held_out"),
        (("--corpus=x", "--out=x.arpa", "--vocabulary=x", "--min_count=2"), "exclude each other"),
    ],
)
def test_errors_of_training(arguments, words):
    with pytest.raises(ValueError, match=words):
        call("ngram", "train", *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "expected one of train, score, next, sample"),
        (("count",), "expected one of train, score, next, sample, not 'count'"),
        (("score", "--order=3"), "--order belongs to train, not to score"),
        (("train", "more"), "unexpected argument 'more'"),
    ],
)
def test_errors_of_commands(arguments, words, capsys):
    with binary("ngram", *arguments) as module, pytest.raises(SystemExit):
        cli._command([a for a in arguments if not a.startswith("--")], module.COMMANDS)
    assert words in capsys.readouterr().err
