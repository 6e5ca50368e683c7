"""WORKSPACE.md's table and README.md are true: files, tests, flags and config fields exist, and its Python runs."""

import pathlib
import re

import jax
import numpy as np
import pytest
from tiny_models import noise

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.t5 import T5Config
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.run_config import RunConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINES = (ROOT / "WORKSPACE.md").read_text().split("## Every technique")[1].splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")][2:]
DONE = [row for row in ROWS if row[3] != "*planned*"]


def test_every_heading_of_the_notes_has_a_row(shared_data):
    notes = (shared_data.parent / "NOTES.md").read_text()
    headings = [line.split("|")[1].strip() for line in notes.splitlines() if line.startswith("| ")]
    skip = {
        "heading",
        "---",
        "**基础 Basics**",
        "**Transformer**",
        "**训练优化 Training at scale**",
        "**模型压缩 Compression**",
    }
    wanted = [h.replace("*", "").strip() for h in headings if h not in skip]
    have = " | ".join(row[0] for row in ROWS)
    missing = [h for h in wanted if not any(part.strip() in have for part in h.split(";"))]
    assert not missing


def binary_source(name):
    """A binary's text, and that of the modules beside it which declare flags for it."""
    folder = ROOT / "experiments"
    file = folder / name / "__main__.py" if (folder / name).is_dir() else folder / f"{name}.py"
    text = file.read_text()
    for package, names in re.findall(r"^from experiments([.\w]*) import (.+)$", text, re.M):
        beside = folder / package.strip(".")
        text += "".join((beside / f"{n}.py").read_text() for n in names.split(", ") if beside.is_dir())
    return text


def check_command(command):
    """A `make` target that exists, or a binary that exists with these flags and config fields."""
    if command.startswith("make "):
        assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.M)
        return
    binary = re.match(r"python -m experiments\.(\w+)", command)
    assert binary is not None, command
    source = binary_source(binary[1])
    defaults = (FinetuneConfig if binary[1] == "finetune" else RunConfig)()
    for flag in re.findall(r"--([\w.]+)=", command):
        if not flag.startswith("config."):
            assert f'"{flag}"' in source, flag
            continue
        value = defaults
        for part in flag.split(".")[1:]:
            assert hasattr(value, part), flag
            value = getattr(value, part)


@pytest.mark.parametrize("row", DONE, ids=lambda row: row[2][:40])
def test_row_names_what_exists(row):
    _, _, _, file, _, test, command = (cell.strip("`") for cell in row)
    assert (ROOT / file).is_file()
    assert (ROOT / test).is_file()
    if command:
        check_command(command)


def test_default_model_is_the_one_the_table_overrides():
    assert isinstance(RunConfig().model, GPTConfig)


README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(python -m .*?|make \w+)(?: +#.*)?$", README, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_exist(command):
    check_command(command)


def test_readme_python_runs(tmp_path, monkeypatch):
    text = "The capital of France is Paris."
    tokenizer = tokenizers.train([text], "char", 1)
    model = LlamaConfig(vocab_size=tokenizer.vocab_size, context_length=64, model_dim=16, num_layers=1, num_heads=2,
                        num_kv_heads=1, head_dim=8, hidden_dim=24).make()  # fmt: skip
    interop.save(tmp_path / "in", model, noise(model, 0.3), tokenizer)
    words = tokenizers.train([text], "wordpiece", 60, tokenizers.MASKED_SPECIAL)
    encoder = BertConfig(60, 32, 16, 1, 2, 24).make()
    interop.save(tmp_path / "bert", encoder, noise(encoder, 0.3), words)
    pair = T5Config(60, 80, 16, 1, 1, 2, 8, 24, num_buckets=8, max_distance=8).make()
    interop.save(tmp_path / "t5", pair, noise(pair, 0.3), words)
    monkeypatch.chdir(tmp_path)
    names = {"input_ids": np.array([tokenizer.encode(text)])}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    folders = {"huggingface_folder": "in", "bert_folder": "bert", "t5_or_marian_folder": "t5"}
    run = lambda block: exec(re.sub(r"path/to/(\w+)", lambda m: f"{tmp_path}/{folders[m[1]]}", block), names)
    decode, adapt, embed, translate = blocks
    run(decode)
    assert names["logits"].shape == (1, len(text), tokenizer.vocab_size)
    assert interop.load(tmp_path / "out").config == model.config
    run(adapt)
    assert jax.tree.structure(names["params"]) == jax.tree.structure(interop.load(tmp_path / "out").params)
    run(embed)
    np.testing.assert_allclose(np.linalg.norm(names["embeddings"], axis=1), [1, 1], rtol=1e-5)
    run(translate)
    assert names["config"] == pair.config
