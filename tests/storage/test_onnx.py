"""ONNX weights: every form that exporters and onnxruntime's quantization write gives the arrays that went in."""

import sys

import numpy as np
import pytest
from graphs import FORMS, Graph, quantized

from llm_jax.storage.onnx import OnnxFile
from llm_jax.storage.safetensors import StorageError

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)


def check(graph, path):
    graph.write(path)
    found = OnnxFile(path)
    assert set(found) == set(graph.weights) and len(found) == len(graph.weights)
    for name, want in graph.weights.items():
        assert name in found and found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], want, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_what_went_in(form, tmp_path):
    graph = Graph()
    graph.table("a.embeddings.weight", draw(7, 4), form)
    graph.plain("a.norm.weight", draw(4))
    y = graph.linear("a.layer.0.up", draw(6, 4), draw(6), form)
    graph.linear("a.layer.0.down", draw(4, 6), draw(4), form, y)
    graph.linear("a.layer.1.square", draw(4, 4), draw(4), form)
    graph.node("Add", [y, graph.tensor("/constant", np.float32(1.4))])
    graph.node("Reshape", [y, graph.tensor("onnx::Reshape_9", np.array([0, -1]))])
    graph.tensor("a.position_ids", np.arange(9)[None])  # a buffer
    check(graph, tmp_path / "model.onnx")
    if form.startswith(("static", "dynamic")):  # half a step is lost
        plain = Graph()
        weight = draw(6, 4)
        plain.linear("a", weight, draw(6), form)
        assert np.abs(plain.weights["a.weight"] - weight).max() < np.abs(weight).max() / 120


def test_integer_biases_named_matrices_and_copies(tmp_path):
    graph, path = Graph(), tmp_path / "model.onnx"
    steps, scale = RNG.integers(-(2**20), 2**20, 5, np.int32), np.float32(1e-3)
    bias = [graph.tensor("a.bias_quantized", steps), graph.tensor("a.bias_scale", scale)]
    y = graph.node("MatMul", ["x", graph.tensor("onnx::MatMul_1", matrix := draw(3, 5))])
    graph.node("Add", [y, graph.node("DequantizeLinear", bias)])
    graph.plain("b.weight", draw(5, 3))  # as it is in the module
    y = graph.node("MatMul", ["x", graph.node("Transpose", ["b.weight"])])
    graph.plain("b.bias", draw(5))
    graph.node("Add", [y, graph.node("Identity", ["b.bias"], ["c.bias"])])
    graph.node("MatMul", [y, graph.tensor("onnx::MatMul_2", nameless := draw(5, 2))])
    graph.weights |= {"a.weight": matrix.T, "a.bias": steps.astype(np.float32) * scale}
    graph.weights |= {"c.bias": graph.weights["b.bias"], "onnx::MatMul_2": nameless}
    check(graph, path)


def twice(graph):
    for _ in range(2):
        graph.linear("a", draw(3, 4), draw(3), "matmul")
        graph.tensors.pop()
    graph.tensor("a.bias", draw(3))


def in_blocks(graph):
    q, scale, zero = graph.parts("a.weight", *quantized(draw(4, 4), np.int8, 1))
    graph.node("DequantizeLinear", [q, scale, zero], axis=1, block_size=2)


def without_scale(graph):
    q, _, zero = graph.parts("onnx::MatMul_1", *quantized(draw(4, 4), np.int8))
    graph.node("Cast", [graph.node("MatMulInteger", ["x", q, "x_zero", zero])], to=1)


@pytest.mark.parametrize(
    "build, words",
    [
        (twice, "are both a.weight"),
        (in_blocks, "a.weight_quantized is quantized in blocks"),
        (without_scale, "the scale of onnx::MatMul_1_quantized is not where"),
    ],
)
def test_what_cannot_be_read_is_named(build, words, tmp_path):
    graph = Graph()
    build(graph)
    graph.write(tmp_path / "model.onnx")
    with pytest.raises(StorageError, match=words):
        OnnxFile(tmp_path / "model.onnx")


def test_errors_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    for file in ("bad.onnx", "none.onnx"):
        with pytest.raises(StorageError, match=f"{file} is not an ONNX model") as error:
            OnnxFile(tmp_path / file)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(StorageError, match=r"pip install 'llm_jax\[onnx\]'"):
        OnnxFile(tmp_path / "bad.onnx")
