"""What a run with --vectors starts from."""

import numpy as np
import pytest
from binaries import binary

from experiments import cli
from llm_jax.interop.word_vectors import files
from llm_jax.training import run

DEMO = "--config=experiments/configs/demo.py:tiny"
SMALL = ("--config.model.model_dim=4", "--config.data.source={0}/text", "--config.model.vocab_size=280")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    (path / "text").mkdir()
    for i in range(9):
        (path / "text" / f"{i}.txt").write_text("the cat saw the dog and the cat " * 9)
    files.write(path / "vectors.txt", ["the", "cat", "bird"], np.random.default_rng(0).normal(size=(3, 4)))
    files.write(path / "other.txt", ["oiseau"], np.ones((1, 4)))
    return path


def begin(folder, *flags):
    given = [f.format(folder) for f in (DEMO, *SMALL, *flags)]
    with binary("train", f"--workdir={folder}/run", *given) as module:
        return module.start(cli.from_config_dict(run.RunConfig, module.CONFIG.value))


def test_the_table_begins_with_vectors(folder, capsys):
    assert begin(folder) == {}
    got = begin(folder, "--vectors={0}/vectors.txt")
    tokenizer, table = got["tokenizer"], np.asarray(got["params"]["embed"]["embedding"])
    ids = [tokenizer.encode(" " + word) for word in ("the", "cat")]
    assert all(len(i) == 1 for i in ids) and got["extra"] == {"vectors": f"{folder}/vectors.txt"}
    matrix = files.read(folder / "vectors.txt")[1][:2]
    rows = table[np.concatenate(ids)]
    np.testing.assert_allclose(rows / np.linalg.norm(rows), matrix / np.linalg.norm(matrix), rtol=1e-4)
    assert "2 of " in capsys.readouterr().out


def test_vectors_of_other_words(folder):
    with pytest.raises(ValueError, match="other.txt holds none of the tokenizer's"):
        begin(folder, "--vectors={0}/other.txt")
