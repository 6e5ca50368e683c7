"""WORKSPACE.md's table of techniques is true: files and tests exist, flags and config fields too."""

import pathlib
import re

import pytest

from llm_jax.models.gpt import GPTConfig
from llm_jax.training.finetune import FinetuneConfig
from llm_jax.training.run import RunConfig

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


@pytest.mark.parametrize("row", DONE, ids=lambda row: row[2][:40])
def test_row_names_what_exists(row):
    _, _, _, file, _, test, command = (cell.strip("`") for cell in row)
    assert (ROOT / file).is_file()
    assert (ROOT / test).is_file()
    if command.startswith("make "):
        assert re.search(rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.M)
        return
    binary = re.match(r"python -m experiments\.(\w+)", command)
    if binary is None:
        assert command == ""
        return
    source = (ROOT / "experiments" / f"{binary[1]}.py").read_text() + (ROOT / "experiments" / "cli.py").read_text()
    defaults = (FinetuneConfig if binary[1] == "finetune" else RunConfig)()
    for flag in re.findall(r"--([\w.]+)=", command):
        if not flag.startswith("config."):
            assert f'"{flag}"' in source, flag
            continue
        value = defaults
        for part in flag.split(".")[1:]:
            assert hasattr(value, part), flag
            value = getattr(value, part)


def test_default_model_is_the_one_the_table_overrides():
    assert isinstance(RunConfig().model, GPTConfig)
