"""Safetensors: bitwise round trips, sharded folders, and files that lie about themselves."""

import json
import random

import numpy as np
import pytest
import safetensors.numpy
from damaged import outcomes_of

from llm_jax.storage import safetensors as storage
from llm_jax.storage.safetensors import DTYPES, StorageError, TensorFolder, write_folder

SHAPES = ((), (3,), (2, 3), (0, 4), (2, 1, 5))


def tensors():
    rng = np.random.default_rng(0)
    out = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            data = rng.integers(0, 2, size, np.uint8) if name == "BOOL" else rng.integers(0, 256, size, np.uint8)
            out[f"{name}.{len(shape)}.{'x'.join(map(str, shape))}"] = data.view(dtype).reshape(shape)
    return out


def same(a, b):
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a
    )


@pytest.mark.parametrize("shard_bytes", [2**30, 64, 1])
def test_round_trip_of_every_dtype(shard_bytes, tmp_path):
    want = tensors()
    write_folder(tmp_path, want.items(), shard_bytes)
    assert same(want, dict(TensorFolder(tmp_path)))
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    if shard_bytes == 2**30:
        assert files == ["model.safetensors"] and not index.exists()
        assert same(want, dict(TensorFolder(tmp_path / files[0])))
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        written = json.loads(index.read_text())
        assert set(written["weight_map"]) == set(want) and set(written["weight_map"].values()) == set(files)
        assert written["metadata"]["total_size"] == sum(a.nbytes for a in want.values())
        shards = [dict(TensorFolder(tmp_path / f)) for f in files]
        assert all(
            len([a for a in s.values() if a.nbytes]) <= 1 or sum(a.nbytes for a in s.values()) <= shard_bytes
            for s in shards
        )
    assert not list(tmp_path.glob("*.tmp"))


def test_writing_over_another_folder_leaves_nothing_of_it(tmp_path):
    write_folder(tmp_path, [("a", np.ones(9)), ("b", np.ones(9))], 8)
    write_folder(tmp_path, [("c", np.ones(2)[::-1])])
    assert list(TensorFolder(tmp_path)) == ["c"] and len(list(tmp_path.iterdir())) == 1


def test_views_are_read_only_and_fortran_arrays_come_back_right(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    write_folder(tmp_path, [("a", array)])
    view = TensorFolder(tmp_path)["a"]
    np.testing.assert_array_equal(view, array)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def two_shards(folder):
    write_folder(folder, [("a", np.ones(4, np.float32)), ("b", np.ones(4, np.float32))], 8)
    return folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"


BROKEN = {
    "nothing there": (lambda d, f, i: [f.unlink() for f in d.iterdir()], "no *.safetensors"),
    "a missing shard": (lambda d, f, i: f.unlink(), "lacks model-00001-of-00002.safetensors, named in its index"),
    "an index of garbage": (lambda d, f, i: i.write_text("{"), "index.json is damaged"),
    "an index of another shape": (lambda d, f, i: i.write_text("[]"), "index.json is damaged"),
    "an index without a map": (lambda d, f, i: i.write_text('{"weight_map": [1]}'), "index.json is damaged"),
    "an index of numbers": (lambda d, f, i: i.write_text('{"weight_map": {"a": 1}}'), "lacks 1, named in its index"),
    "a tensor twice": (
        lambda d, f, i: (i.unlink(), (d / "copy.safetensors").write_bytes(f.read_bytes())), "a is stored twice"),
    "half a file": (lambda d, f, i: f.write_bytes(f.read_bytes()[:-5]), "not a readable safetensors file"),
    "an empty file": (lambda d, f, i: f.write_bytes(b""), "not a readable safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_one_line(case, tmp_path):
    file, index = two_shards(tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path, file, index)
    with pytest.raises(StorageError) as error:
        TensorFolder(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_outside_the_index_are_left_alone(tmp_path):
    file, _ = two_shards(tmp_path)
    (tmp_path / "old.safetensors").write_bytes(file.read_bytes())
    assert sorted(TensorFolder(tmp_path)) == ["a", "b"]


BESIDE = ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors")


@pytest.mark.parametrize("shard_bytes", [2**30, 8], ids=["one file", "shards"])
def test_files_beside_the_model_are_left_and_named(shard_bytes, tmp_path, caplog):
    """A copy, an adapter, another precision: none of them is the model, nor are they lost when it is written."""
    want = {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}
    for name in (*BESIDE, "optimizer.safetensors"):
        safetensors.numpy.save_file({"a": np.full(4, 7, np.float32)}, tmp_path / name)
    write_folder(tmp_path, want.items(), shard_bytes)
    assert same(want, dict(TensorFolder(tmp_path)))
    assert all(name in caplog.text for name in BESIDE)


def test_a_stale_index_beside_a_whole_file_is_left(tmp_path, caplog):
    _, index = two_shards(tmp_path)
    old = index.read_text()
    write_folder(tmp_path, [("c", np.ones(2))])
    index.write_text(old)
    assert list(TensorFolder(tmp_path)) == ["c"]
    assert "reading model.safetensors, leaving model.safetensors.index.json" in caplog.text


def test_odd_names_are_read_where_nothing_else_is_there(tmp_path):
    write = lambda name, *tensors: safetensors.numpy.save_file(dict.fromkeys(tensors, np.ones(1)), tmp_path / name)
    assert not storage.has_model(tmp_path)
    write("consolidated.safetensors", "a")
    assert list(TensorFolder(tmp_path)) == ["a"] and not storage.has_model(tmp_path)
    write("model.fp16.safetensors", "b")
    with pytest.raises(StorageError, match="holds consolidated.safetensors, model.fp16.safetensors and no model.safe"):
        TensorFolder(tmp_path)
    write("weights.safetensors", "c")
    assert list(TensorFolder(tmp_path)) == ["c"] and storage.has_model(tmp_path)
    write("more.safetensors", "d")  # parts
    assert list(TensorFolder(tmp_path)) == ["d", "c"]
    write("more.safetensors", "c")
    with pytest.raises(StorageError, match="c is stored twice in .*: in more.safetensors and in weights.safetensors"):
        TensorFolder(tmp_path)


def test_an_unsupported_dtype_is_named(tmp_path):
    safetensors.numpy.save_file({"c": np.ones(2, np.uint64)}, tmp_path / "a.safetensors")
    with pytest.raises(StorageError, match="c has dtype U64, which is not supported"):
        TensorFolder(tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    write_folder(tmp_path, [("a", np.ones(4))])
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        safetensors.numpy.save_file(tensors, path, metadata)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="could not be written.*No space left on device"):
        write_folder(tmp_path, [("b", np.ones(4)), ("c", np.ones(4))], 8)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and list(TensorFolder(tmp_path)) == ["a"]


def test_damaged_files_load_or_are_refused(tmp_path):
    """Several hundred damaged headers: no crash, no hang, and nothing larger than the file is ever allocated."""
    some = {k: v for k, v in tensors().items() if k.startswith(("F32", "BF16", "I64", "BOOL"))}
    write_folder(tmp_path, some.items())
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")

    def variants():
        rng = random.Random(0)
        for round_ in range(400):
            data = bytearray(good)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if round_ % 4 == 3:  # a digit for a digit: headers that parse and lie
                    digits = [i for i in range(8, header) if chr(data[i]).isdigit()]
                    data[rng.choice(digits)] = ord(rng.choice("0123456789"))
                else:
                    data[rng.randrange(8 if round_ % 8 == 0 else header)] = rng.randrange(256)
            yield data[: rng.randrange(len(data))] if round_ % 5 == 4 else data

    def read(length):
        assert sum(a.nbytes for a in TensorFolder(file).values()) <= length

    outcomes, peak = outcomes_of(file, variants(), read)
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 200 and peak < 2**24, (outcomes, peak)


def test_texts_beside_the_tensors(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2)}, file, metadata={"format": "pt"})
    assert storage.metadata(file) == {"format": "pt"}
    file.write_bytes(b"not safetensors")
    with pytest.raises(StorageError, match="a.safetensors is not a readable safetensors file"):
        storage.metadata(file)
