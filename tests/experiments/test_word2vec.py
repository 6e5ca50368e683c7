"""The word2vec binary: trains, goes on, evaluates, answers; and what it refuses."""

import gzip
import json

import numpy as np
import pytest
from binaries import binary, call

from llm_jax.classic.text.sentences import TextError
from llm_jax.classic.vectors.word_vectors import VectorsError
from llm_jax.interop.word_vectors import files
from llm_jax.training.workdir import WorkdirError

SMALL = ("--size=8", "--block=256", "--blocks=2", "--sample=0", "--epochs=2")
TOPICS = (["red", "green", "blue", "black", "white"], ["cat", "dog", "cow", "horse", "sheep"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    path = tmp_path_factory.mktemp("word2vec")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(TOPICS[i % 2], 8)) for i in range(200)]
    (path / "0.txt").write_text("\n".join(lines[:100]))
    with gzip.open(path / "1.txt.gz", "wt") as f:
        f.write("\n".join([*lines[100:], "rare"]))
    for name, text in (
        ("wordsim353.tsv", "cat\tdog\t9\nred\tcow\t1\nred\tblue\t8\nunknown\tcat\t3\n"),
        ("simlex999.txt", "# two words and a score\ncat\tcow\t5\nsheep\twhite\t2\n"),
        ("questions-words.txt", ": animals\ncat dog cow horse\n: gram1-x\nred green blue unknown\n"),
    ):
        (path / name).write_text(text)
    call("word2vec", "train", f"--corpus={path}/[01].txt*", f"--out={path}/vectors.txt", *SMALL)
    return path


def test_a_finished_run_is_written_again(folder, capsys):
    words, table = files.read(folder / "vectors.txt")
    assert set(words) == {*TOPICS[0], *TOPICS[1]} and table.shape == (10, 8)
    out = f"--out={folder}/again.bin"
    corpus = f"--corpus={folder}/[01].txt*"
    run = f"--workdir={folder}/vectors.txt.run"
    call("word2vec", "train", corpus, out, run, "--format=word2vec_binary", *SMALL)
    again = files.read(folder / "again.bin")
    assert again[0] == words and (again[1] == table).all()
    assert "1,601 words, 10 different ones kept, which are 99.9% of the text" in capsys.readouterr().out
    with pytest.raises(WorkdirError, match="schedule.seed: 1 -> 2"):
        call("word2vec", "train", corpus, out, run, "--seed=2", *SMALL)


def test_evaluation(folder, capsys):
    read, tests = f"--vectors={folder}/vectors.txt", f"--tests={folder}"
    call("word2vec", "evaluate", read, tests, f"--json={folder}/quality.json")
    found = json.loads((folder / "quality.json").read_text())
    assert set(found) == {"wordsim353", "simlex999", "analogies", "words_per_second"}
    assert found["simlex999"] in (1.0, -1.0) and found["analogies"] in (0.0, 1.0) and found["words_per_second"] > 0
    shown = capsys.readouterr().out
    assert "wordsim353: Spearman" in shown and "3 pairs, 1 unknown" in shown
    assert "analogies, syntactic: 0 of 0 (nan%), 1 unknown" in shown


def test_results_and_speed_are_files_of_their_own(folder, capsys):
    """Whatever lies beside vectors; and vectors from elsewhere under the same name have no speed."""
    words, table = files.read(folder / "vectors.txt")
    path = folder / "other.txt"
    files.write(path, words[:-1], table[:-1])
    (folder / "other.txt.training.json").write_text((folder / "vectors.txt.training.json").read_text())
    for _ in range(2):
        call("word2vec", "evaluate", f"--vectors={path}", f"--tests={folder}", f"--json={path}.json")
        assert set(json.loads((folder / "other.txt.json").read_text())) == {"wordsim353", "simlex999", "analogies"}


def test_words_that_are_no_utf8(folder, capsys, caplog):
    path = folder / "latin.txt"
    path.write_bytes(b"2 2\nol\xe9 1 2\nhat 3 4\n")
    with pytest.raises(VectorsError, match="invalid=skip"):
        call("word2vec", "nearest", f"--vectors={path}", "--word=hat")
    call("word2vec", "nearest", f"--vectors={path}", "--word=hat", "--invalid=replace")
    assert "1 words were no UTF-8" in caplog.text
    assert capsys.readouterr().out == "0.9839 ol\ufffd\n"


def test_answers(folder, capsys):
    read = f"--vectors={folder}/vectors.txt"
    call("word2vec", "nearest", read, "--word=cat", "--top=3", f"--json={folder}/nearest.json")
    found = json.loads((folder / "nearest.json").read_text())["nearest"]
    assert len(found) == 3 and capsys.readouterr().out.splitlines()[0] == f"{found[0][1]:.4f} {found[0][0]}"
    call("word2vec", "analogy", read, "--words=cat,dog,cow", "--method=3cosmul", f"--json={folder}/analogy.json")
    found = json.loads((folder / "analogy.json").read_text())
    assert len(found["analogy"]) == 7 and not {w for w, _ in found["analogy"]} & {"cat", "dog", "cow"}
    call("word2vec", "plot", read, "--words=cat,dog,red,blue", f"--out={folder}/plot.png")
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"


BAD = [
    (("train", "--out=x"), ValueError, "--corpus is missing"),
    (("train", "--corpus=none.txt", "--out=x"), TextError, "none.txt is not a file"),
    (("train", "--corpus={}/0.txt", "--out=x", "--min_count=999"), TextError, "no word occurs min_count=999 times"),
    (
        ("train", "--corpus={}/0.txt", "--out=x", "--learning_rate=nan"),
        ValueError,
        "learning_rate=nan must be a positive number",
    ),
    (
        ("train", "--corpus={}/0.txt", "--out=x", "--loss=sampled", "--negatives=3"),
        ValueError,
        "--negatives needs --loss=negative_sampling, not sampled",
    ),
    (
        ("train", "--corpus={}/0.txt", "--out=x", "--loss=full", "--exponent=0.5"),
        ValueError,
        "--exponent needs --loss=negative_sampling or sampled, not full",
    ),
    (
        ("train", "--corpus={}/0.txt", "--out=x", "--subsampling=paper", "--sample=0"),
        ValueError,
        "--subsampling has no effect with --sample=0",
    ),
    (("train", "--corpus={}/0.txt", "--out=x", "--size=0"), ValueError, "size=0 must be at least 1"),
    (("train", "--corpus={}/0.txt", "--out=x", "--block=100"), ValueError, "block=100 must be a multiple of tile=32"),
    (("nearest", "--vectors={}/vectors.txt", "--word=Cat"), VectorsError, "'Cat' is not among .* 'cat' is"),
    (("nearest", "--vectors={}/vectors.txt"), ValueError, "--word is missing"),
    (("analogy", "--vectors={}/vectors.txt", "--words=cat,dog"), ValueError, "must be three words"),
    (("evaluate", "--vectors={}/vectors.txt", "--tests=none"), VectorsError, "none/wordsim353.tsv is not a file"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(folder, arguments, error, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call("word2vec", *(a.format(folder) for a in arguments))


def test_one_word_has_no_tree(tmp_path):
    (tmp_path / "a.txt").write_text("a a a a a\n" * 9)
    with pytest.raises(ValueError, match="a tree needs two words"):
        call("word2vec", "train", f"--corpus={tmp_path}/a.txt", f"--out={tmp_path}/v", "--loss=hierarchical", *SMALL)


def test_flags_of_another_command(capsys):
    with pytest.raises(SystemExit), binary("word2vec", "nearest", "--epochs=3") as module:
        from experiments import cli

        cli._command(["nearest"], module.COMMANDS)
    assert "--epochs belongs to train, not to nearest" in capsys.readouterr().err
