"""The n-gram binary: trains, scores, goes on, draws; and what it refuses."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from binaries import binary, call
from letters import TEXT

from experiments import cli
from llm_jax.classic import arpa


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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--corpus=gone.txt", "--out=x.arpa"), "gone.txt is no file"),
        (("--corpus=gone.txt",), "--out is missing"),
        (("--corpus=gone.txt", "--out=x.arpa", "--smoothing=add_k"), "give --out a folder's name"),
        (("--corpus=gone.txt", "--out=x.arpa", "--k=2"), "--k is of --smoothing=add_k"),
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
        (("score", "--order=3"), "--order is of train, not of score"),
        (("train", "more"), "unexpected argument 'more'"),
    ],
)
def test_errors_of_commands(arguments, words, capsys):
    with binary("ngram", *arguments) as module, pytest.raises(SystemExit):
        cli._command([a for a in arguments if not a.startswith("--")], module.COMMANDS)
    assert words in capsys.readouterr().err


def test_errors_are_one_line():
    command = [sys.executable, "-m", "experiments.ngram", "next"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "error: --model is missing\n")
