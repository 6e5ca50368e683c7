"""Runs and models that an earlier version wrote resume, load and predict as they did there.

`runs_of_november.zip` holds them; their numbers are those that this version reported. A failure means that a layout on
disk changed: field names of a config, types of structured weights, names of arrays, or what a file holds.
"""

import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest
from binaries import call

from llm_jax import interop
from llm_jax.decoding.score import of_text
from llm_jax.nn import paths
from llm_jax.training.run import load_config, train

TEXT = "the quiet cat sang on the mat ."
FINETUNE = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "configs" / "finetune.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("november")
    with zipfile.ZipFile(pathlib.Path(__file__).with_name("runs_of_november.zip")) as archive:
        archive.extractall(out)
    for run in ("gpt", "lora"):  # which went on to step 10, from the checkpoint that is here
        file = out / run / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= 5))
    return out


@pytest.fixture(scope="module")
def here(folder):
    """The folder that the runs were started in, to which their configs are relative, and the one device they ran on."""
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jax, "devices", lambda *_: device)
        yield folder


@pytest.fixture(scope="module")
def resumed(here):
    """The decoder, trained from step 5 to 10."""
    return train(load_config("gpt"), "gpt")


def reported(run, name):
    """The last value of a metric."""
    lines = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line][-1]


def test_a_decoder_resumes(here, resumed):
    """Muon, accumulation and a moving average."""
    assert resumed.state.step == 10
    assert reported("gpt", "train/loss") == (10, pytest.approx(4.732413291931152, rel=1e-5))
    loaded, mean = interop.load("gpt", average=False), interop.load("gpt")
    for (path, x), (_, average) in zip(paths.flatten(loaded.params), paths.flatten(mean.params), strict=True):
        assert np.any(x != average), path
    for params in (loaded.params, mean.params):
        perplexity = np.exp(-of_text(loaded.model, params, loaded.tokenizer, TEXT).mean())
        assert perplexity < loaded.config.vocab_size  # better than guessing


def test_lora_over_an_int8_base_resumes(here, resumed):
    """The base that was quantized then, and the matrices that trained."""
    overrides = {
        "base": "int8", "run.data.source": "text.txt", "run.data.validation_share": 0.1, "run.data.split": "tail",
        "run.training.steps": 10, "run.training.sequence_length": 16, "run.training.checkpoint_every": 5,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    call("finetune", "--model=gpt", "--workdir=lora", f"--config={FINETUNE}", *flags)
    assert reported("lora", "train/loss") == (10, pytest.approx(4.530045509338379, rel=1e-5))
    assert reported("lora", "eval/loss") == (10, pytest.approx(4.522432433234321, rel=1e-5))
    merged = interop.load("lora/merged")
    adapted = interop.load("lora")
    np.testing.assert_allclose(of_text(*merged[:3], TEXT), of_text(*adapted[:3], TEXT), rtol=1e-4, atol=1e-4)


def test_word_vectors_come_from_their_checkpoint(here):
    """The command that wrote them finds its run finished, and writes the same file from its checkpoint."""
    before = (here / "vectors.txt").read_bytes()
    (here / "vectors.txt").unlink()
    flags = ["--size=8", "--block=64", "--blocks=2", "--epochs=2", "--min_count=2"]
    call("word2vec", "train", "--corpus=text.txt", *flags, "--out=vectors.txt")
    assert (here / "vectors.txt").read_bytes() == before


@pytest.mark.parametrize("name", ["bayes", "cnn"])
def test_classifiers_measure_what_they_did(name, here):
    call("classify", "evaluate", f"--model_folder={name}", "--data=labels.csv", "--test=labels.csv", "--json=out.json")
    found, before = (json.loads((here / file).read_text()) for file in ("out.json", f"{name}/metrics.json"))
    assert found == {part: before[part] for part in ("train", "dev", "test")}
