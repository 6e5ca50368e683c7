"""The word-by-word baseline, and the translation binary on a tiny run."""

import json

import pytest
from binaries import call

from llm_jax.classic.text import alignment
from llm_jax.models.transformer import TransformerConfig
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.training import run
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig


def test_model_1_finds_what_stands_for_what():
    """The classic three sentences: das house, das buch, ein buch."""
    pairs = [("das Haus", "the house"), ("das Buch", "the book"), ("ein Buch", "a book")]
    lexicon = alignment.learn(pairs, rounds=10)
    assert lexicon == {"das": "the", "haus": "house", "buch": "book", "ein": "a"}
    assert alignment.translate(lexicon, "Ein Haus, das Buch!") == "a house, the book!"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    path = tmp_path_factory.mktemp("translate")
    words = {"one": "uno", "two": "dos", "red": "rojo", "cat": "gato"}
    rows = []
    for i in range(200):
        chosen = [list(words)[(i // 4**k) % 4] for k in range(4)]
        rows.append("\t".join((" ".join(chosen), " ".join(words[w] for w in chosen))))
    (path / "pairs.tsv").write_text("en\tes\n" + "\n".join(rows) + "\n")
    config = run.RunConfig(
        model=TransformerConfig(
            vocab_size=300, context_length=32, model_dim=16, num_layers=1, num_heads=2, hidden_dim=16, dropout=0.0
        ),
        data=run.DataConfig(str(path / "pairs.tsv"), validation_share=0.2, fields=("en", "es")),
        objective=Seq2Seq(),
        optimizer=OptimizerConfig("adam", 1e-3, weight_decay=0.0),
        training=LoopConfig(4, 8, 16, checkpoint_every=2, keep_last=2, eval_every=0),
    )
    run.train(config, path / "run")
    return path


def test_translate(workdir, capsys):
    pytest.importorskip("sacrebleu", reason="BLEU is sacrebleu's")
    arguments = (f"--workdir={workdir / 'run'}", "--limit=5", "--batch_size=4", "--beams=2", f"--out={workdir / 'o'}")
    call("translate", *arguments, "--average_last=2")
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["word_by_word"] > 99 and 0 <= scores["bleu"] <= 100  # words stand for words here
    rows = [json.loads(line) for line in (workdir / "o").read_text().splitlines()]
    assert len(rows) == 5 and set(rows[0]) == {"source", "translation", "reference"}
    with pytest.raises(ValueError, match="keeps 2 checkpoints: raise training.keep_last"):
        call("translate", *arguments, "--average_last=3")
