"""GGUF: every quantization equals the gguf package's own numbers; damaged files are refused without harm."""

import random
import struct

import gguf
import numpy as np
import pytest
from damaged import outcomes_of
from gguf import GGMLQuantizationType as Q

from llm_jax.storage.gguf import GgufFile
from llm_jax.storage.safetensors import StorageError

QUANTIZED = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)
BYTES_ONLY = (Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL)  # the package reads these and does not write them


def write(path, metadata=True):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if metadata:
        writer.add_block_count(3)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_name("a name é")
        writer.add_token_list(["a", "b", "<c>"])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_add_bos_token(True)
    want = {}
    for kind in QUANTIZED:
        array = rng.normal(size=(6, 64)).astype(np.float32)
        data = gguf.quantize(array, kind)
        writer.add_tensor(kind.name, data, raw_dtype=None if kind in (Q.F32, Q.F16) else kind)
        want[kind.name] = (array, gguf.dequantize(data, kind))
    for kind in BYTES_ONLY:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (2, 256 // block * size), np.uint8)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        with np.errstate(all="ignore"):
            want[kind.name] = (None, gguf.dequantize(data, kind))
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return want


def test_every_type_equals_the_packages_own_numbers(tmp_path):
    want = write(tmp_path / "a.gguf")
    file = GgufFile(tmp_path / "a.gguf")
    assert set(file) == {*want, "vector", "cube"} and len(file) == len(want) + 2
    steps = {"F32": 0, "F16": 2**-9, "BF16": 2**-6, "Q8_0": 0.02, "Q4_0": 0.4, "Q4_1": 0.3, "Q5_0": 0.2, "Q5_1": 0.15}
    for name, (array, values) in want.items():
        with np.errstate(all="ignore"):
            found = file[name]
        np.testing.assert_array_equal(found, values, err_msg=name)
        assert found.shape == file.shape(name) == values.shape and found.dtype == np.float32
        if array is not None:
            assert np.abs(found - array).max() <= steps[name], name
    np.testing.assert_array_equal(file["vector"], np.arange(5))
    np.testing.assert_array_equal(file["cube"], np.arange(24).reshape(2, 3, 4))


def test_metadata(tmp_path):
    write(tmp_path / "a.gguf")
    found = GgufFile(tmp_path / "a.gguf").metadata
    assert found["general.architecture"] == "llama" and found["general.name"] == "a name é"
    assert found["llama.block_count"] == 3 and found["tokenizer.ggml.add_bos_token"] is True
    assert found["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert found["tokenizer.ggml.tokens"] == ["a", "b", "<c>"] and found["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]


def header(version=3, tensors=0, entries=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


key = struct.pack("<Q", 1) + b"k"
name = struct.pack("<Q", 1) + b"t"
BROKEN = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" * 10, "not a GGUF file"),
    "only the magic": (b"GGUF", "cut short"),
    "version 1": (header(version=1) + b"\0" * 64, "GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version"),
    "countless tensors": (header(tensors=2**60), "cannot fit"),
    "countless entries": (header(entries=2**60), "cannot fit"),
    "an endless key": (header(entries=1, rest=struct.pack("<Q", 2**62) + b"\0" * 64), "past the end"),
    "an unknown value": (header(entries=1, rest=key + struct.pack("<I", 77)), "value type 77"),
    "an endless string": (header(entries=1, rest=key + struct.pack("<IQ", 8, 2**62)), "past the end"),
    "an endless array": (header(entries=1, rest=key + struct.pack("<IIQ", 9, 4, 2**62)), "an array of"),
    "nested arrays": (header(entries=1, rest=key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "type 9"),
    "five dimensions": (header(tensors=1, rest=name + struct.pack("<I", 5) + b"\1" * 99), "5 dimensions"),
    "a huge tensor": (header(tensors=1, rest=name + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)), "numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_line(case, tmp_path):
    data, message = BROKEN[case]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(StorageError) as error:
        GgufFile(tmp_path / "a.gguf")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(StorageError, match="no GGUF file at"):
        GgufFile(tmp_path / "none.gguf")


def test_an_unreadable_type_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("t", np.zeros((2, gguf.GGML_QUANT_SIZES[Q.Q8_1][1]), np.uint8), raw_dtype=Q.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StorageError, match="t has type Q8_1, which cannot be read"):
        GgufFile(tmp_path / "a.gguf")["t"]


def test_damaged_files_load_or_are_refused(tmp_path):
    """Several hundred damaged headers and truncations: no crash, no hang, no allocation beyond the file's size."""
    path = tmp_path / "a.gguf"
    write(path)
    good = path.read_bytes()
    size = good.index(np.arange(5, dtype=np.float32).tobytes()[4:]) // 2  # somewhere behind the header

    def variants():
        rng = random.Random(0)
        for round_ in range(300):
            data = bytearray(good)
            for _ in range(rng.choice((1, 1, 2, 6))):
                data[rng.randrange(24 if round_ % 6 == 0 else min(size, 1800))] = rng.randrange(256)
            yield data[: rng.randrange(len(data))] if round_ % 4 == 3 else data

    def read(length):
        file = GgufFile(path)
        for name in file:
            with np.errstate(all="ignore"):
                assert file[name].nbytes <= 32 * 4 * length

    outcomes, peak = outcomes_of(path, variants(), read)
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 100 and peak < 2**25, (outcomes, peak)
