"""Labels from the command line: fine-tune, predict, evaluate; what is given wrongly is one line."""

import io
import json
import pathlib
import sys

import pytest
from binaries import binary, call
from tiny_models import BERT, noise

from experiments import cli
from experiments.configs import labels as experiment
from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.decoding.predict import predict
from llm_jax.models.bert import BertConfig
from llm_jax.objectives.labels import Labels
from llm_jax.training.finetune import FinetuneConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/experiments/configs/labels.py"
TEXT = "the cat sat on a mat , and the dog saw one more cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder, a table, tagged words."""
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = tokenizers.train([TEXT] * 9, "wordpiece", 60, tokenizers.MASKED_SPECIAL)
    model = BertConfig(**{**BERT, "vocab_size": tokenizer.vocab_size}, head="none").make()
    interop.save(path, model, noise(model, 0.3), tokenizer)
    (path / "rows.tsv").write_text("s\ty\n" + "the cat sat\tB\na dog\tA\n" * 8)
    return path


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory, one_device):
    work = tmp_path_factory.mktemp("work")
    values = {
        "data.source": folder / "rows.tsv", "data.validation": folder / "rows.tsv", "data.fields": "('s','y')",
        "training.steps": 2, "training.batch_size": 8, "training.sequence_length": 8, "training.eval_every": 0,
    }  # fmt: skip
    call("finetune", CONFIG, f"--model={folder}", f"--workdir={work}",
         *(f"--config.run.{k}={v}" for k, v in values.items()))  # fmt: skip
    return work


def test_finetune_predict_evaluate(folder, tuned, capsys, monkeypatch, tmp_path):
    merged = interop.load(tuned / "merged")
    assert merged.config.labels == ("A", "B") and merged.config.head == "classification"
    want = predict(merged.model, merged.params, merged.tokenizer, [("the cat",), ("one mat",)])
    for model in (tuned, tuned / "merged"):
        call("predict", f"--model={model}", "--text=the cat", "--text=one mat")
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"{w['label']}\t{w['probability']:.4f}" for w in want]
    (tmp_path / "in.txt").write_text("the cat\n\none\u2028mat\n", "utf-8")  # a blank, no line end
    call("predict", f"--model={tuned}", f"--file={tmp_path / 'in.txt'}", "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[2]["input"] == ["one\u2028mat"]
    assert found[2]["probabilities"] == pytest.approx(want[1]["probabilities"])
    assert found[1] == {"input": []} and len(found) == 3
    call("predict", f"--model={tuned}", f"--file={tmp_path / 'in.txt'}")
    assert capsys.readouterr().out.splitlines() == [lines[0], "", lines[1]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\ta dog\n")))
    call("predict", f"--model={tuned}", "--file=-")
    pair = capsys.readouterr().out
    call("predict", f"--model={tuned}", "--text=the cat", "--text_pair=a dog")
    assert capsys.readouterr().out == pair
    out = tmp_path / "numbers.json"
    call("evaluate", f"--model={tuned}", f"--source={folder}/rows.tsv", "--fields=s,y", "--sequence_length=8",
         f"--json={out}")  # fmt: skip
    numbers = json.loads(out.read_text())
    said = predict(merged.model, merged.params, merged.tokenizer, [("the cat sat",), ("a dog",)])
    assert numbers["eval/accuracy"] == sum(s["label"] == y for s, y in zip(said, "BA", strict=True)) / 2


@pytest.mark.parametrize("head, arguments", [
    ("tokens", ["--text=the mate sat"]),
    ("span", ["--question=one cat", f"--context={TEXT}"]),
    ("choice", ["--text=the cat", "--choice=sat", "--choice=a dog"]),
    ("regression", ["--text=the cat"]),
])  # fmt: skip
def test_every_head_speaks(head, arguments, folder, capsys, tmp_path):
    kind = "classification" if head == "regression" else head
    loaded = interop.load(folder, head=kind, labels=("X",) if head == "regression" else ("X", "Y"))
    interop.save(tmp_path, loaded.model, loaded.params, loaded.tokenizer)
    inputs = {"tokens": ("the", "mate", "sat"), "span": ("one cat", TEXT), "choice": ("the cat", "sat", "a dog"),
              "regression": ("the cat",)}[head]  # fmt: skip
    (want,) = predict(loaded.model, loaded.params, loaded.tokenizer, [inputs])
    call("predict", f"--model={tmp_path}", *arguments)
    printed = capsys.readouterr().out.strip("\n")
    if head == "tokens":
        assert printed == " ".join(f"{w}/{t}" for w, t in zip(inputs, want["tags"], strict=True))
    elif head == "regression":
        assert printed == f"{want['value']:.4f}"
    else:
        assert printed == f"{want['choice' if head == 'choice' else 'answer']}\t{want['probability']:.4f}"


WRONG = [
    ((), "give one of --text, --question with --context, or --file"),
    (("--text=a", "--file=x"), "give one of --text"),
    (("--text_pair=a", "--file=x"), "--text_pair and --choice belong to --text"),
    (("--question=a",), "--question and --context need each other"),
    (("--text=a", "--text=b", "--text_pair=c"), "2 --text, 1 --text_pair and 0 --choice do not go together"),
    (("--file=/dev/null",), "--file=/dev/null holds no input"),
    (("--file=/none.txt",), "No such file or directory: '/none.txt'"),
    (("--text=",), "cannot read ('',)"),
    (("--text=a", "--choice=b", "--choice=c"), "a model with head='classification' cannot read ('a', 'b', 'c')"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_inputs(arguments, message, tuned):
    with pytest.raises((ValueError, OSError)) as e:
        call("predict", f"--model={tuned}", *arguments)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_model_without_labels(folder):
    with pytest.raises(ValueError, match="head='none' and no labels"):
        call("predict", f"--model={folder}", "--text=a")
    with pytest.raises(ValueError, match="--fields names fields of --source"):
        call("evaluate", f"--model={folder}", "--fields=a,b", "--sentence=a")


@pytest.mark.parametrize("variant", experiment.TASKS)
def test_the_experiments_are_configs(variant, shared_data):
    with binary("finetune", f"{CONFIG}:{variant}", "--model=x") as module:
        config = cli.from_config_dict(FinetuneConfig, module.CONFIG.value)
    run = config.run
    assert isinstance(run.objective, Labels) and run.data.fields == experiment.TASKS[variant].files.fields
    for source in (run.data.source, run.data.validation):
        assert (shared_data.parents[1] / source.removeprefix("../")).exists()
    with pytest.raises(ValueError, match="variant 'x' is not one of sst2, "):
        experiment.get_config("x")
