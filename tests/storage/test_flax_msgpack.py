"""Folders of Flax in transformers 4: written here by its rules, read back, and damaged."""

import json

import numpy as np
import pytest
from flax import serialization, traverse_util
from tiny_models import ENCODERS, MODELS, noise

from llm_jax import interop
from llm_jax.nn import paths
from llm_jax.storage import flax_msgpack
from llm_jax.storage.safetensors import StorageError, TensorFolder, save_file

NORMS = ("LayerNorm", "layer_norm", "ln_1", "ln_2", "ln_f", "norm", "layernorm", "vocab_layer_norm")


def flax_name(name, array):
    """Theirs: (path, array), by the kind of module that holds a weight."""
    *front, last = name.split(".")
    if last == "weight":
        kind = front[-1]
        if kind.endswith(NORMS):
            return (*front, "scale"), array
        if kind.endswith("embeddings") or kind in ("wte", "wpe", "embed_tokens"):
            return (*front, "embedding"), array
        return (*front, "kernel"), array.T
    return (*front, last), array


def rewrite(folder):
    """Turns a safetensors folder into what Flax in transformers 4 would have saved."""
    flat = dict(flax_name(n, np.array(a)) for n, a in TensorFolder(folder).items())
    albert = {}
    for path, array in flat.items():  # its lists of layers went under `layers`
        text = (
            "/".join(path)
            .replace("layer_groups/", "layer_groups/layers/")
            .replace("albert_layers/", "albert_layers/layers/")
        )
        albert[tuple(text.split("/"))] = array
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / flax_msgpack.FILE).write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(albert)))


ROWS = {**ENCODERS, "gpt2": MODELS["gpt2"], "llama": MODELS["llama"]}


@pytest.mark.parametrize("name", ROWS)
def test_what_flax_wrote_is_read(name, tmp_path):
    model = ROWS[name].make()
    params = noise(model, 0.3)
    interop.save(tmp_path, model, params)
    want = interop.load(tmp_path).params
    rewrite(tmp_path)
    got = interop.load(tmp_path).params
    assert [p for p, _ in paths.flatten(got)] == [p for p, _ in paths.flatten(want)]
    for (path, a), (_, b) in zip(paths.flatten(got), paths.flatten(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_damaged_files_are_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"no flax_model.msgpack in"):
        flax_msgpack.read(tmp_path)
    file = tmp_path / flax_msgpack.FILE
    whole = serialization.msgpack_serialize({"a": {"kernel": np.ones((2, 3), np.float32)}})
    rng = np.random.default_rng(0)
    for _ in range(200):
        cut = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for i in rng.integers(0, max(len(cut), 1), 2):
            if cut:
                cut[i % len(cut)] = rng.integers(256)
        file.write_bytes(bytes(cut))
        try:
            flax_msgpack.read(tmp_path)
        except StorageError as e:
            assert "\n" not in str(e) and str(file) in str(e)
    file.write_bytes(serialization.msgpack_serialize({"a": "text"}))
    with pytest.raises(StorageError, match="is not an array"):
        flax_msgpack.read(tmp_path)


SHARD = "flax_model-00001-of-00002.msgpack"


def in_shards(folder):
    """Cuts `flax_model.msgpack` in two, as transformers 4 did past a size: paths with slashes in the index."""
    flat = traverse_util.flatten_dict(serialization.msgpack_restore((folder / flax_msgpack.FILE).read_bytes()))
    (folder / flax_msgpack.FILE).unlink()
    places = {}
    for i, keys in enumerate((list(flat)[::2], list(flat)[1::2])):
        name = f"flax_model-{i + 1:05d}-of-00002.msgpack"
        part = {k: flat[k] for k in keys}
        (folder / name).write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(part)))
        places |= {"/".join(k): name for k in keys}
    (folder / flax_msgpack.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def test_shards_are_read_and_beside_strays_too(tmp_path):
    model = MODELS["gpt2"].make()
    interop.save(tmp_path, model, noise(model, 0.3))
    want = {n: np.array(a) for n, a in TensorFolder(tmp_path).items()}
    rewrite(tmp_path)
    in_shards(tmp_path)
    got = flax_msgpack.read(tmp_path)
    assert got.keys() == want.keys() and all(np.array_equal(got[n], want[n]) for n in want)
    save_file({"a": np.ones(2)}, tmp_path / "adapter_model.safetensors")  # which holds no model
    assert interop.load(tmp_path).params["embed"]["embedding"].shape == want["transformer.wte.weight"].shape


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "flax_model-00002-of-00002.msgpack").unlink(), "no flax_model-00002-of-00002.msgpack in"),
        (lambda d: (d / flax_msgpack.INDEX).write_text("{}"), "index.json is damaged: KeyError"),
        (lambda d: (d / flax_msgpack.INDEX).write_text(json.dumps({"weight_map": {"x/kernel": SHARD}})),
         f"x.weight is in none of {SHARD}"),
    ],
)  # fmt: skip
def test_damaged_shards_are_one_line(damage, words, tmp_path):
    (tmp_path / flax_msgpack.FILE).write_bytes(serialization.msgpack_serialize({"a": np.ones(2), "b": np.ones(2)}))
    in_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(StorageError) as error:
        flax_msgpack.read(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
