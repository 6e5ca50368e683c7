"""ONNX files: the weights of an exported module, dequantized, under the names that they had in it.

An export keeps the names of biases, norms and tables. The matrix of a linear layer comes out transposed and nameless
(`onnx::MatMul_753`): from the product that reads it the graph leads to the sum with `X.bias`, so it is `X.weight`.
Quantized weights are read with the scale and zero point that the graph names: in a `DequantizeLinear` (behind a
`Gather` for tables), or in a `MatMulInteger` (dynamic quantization). How a graph quantizes activations does not matter
here.

Source: the ONNX operators, https://onnx.ai/onnx/operators/; onnxruntime's quantization, whose forms these are.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.storage.lazy import LazyTensors
from llm_jax.storage.safetensors import StorageError

_NAMED = re.compile(r"\w+(\.\w+)+")
_PASSED = ("QuantizeLinear", "DequantizeLinear", "Cast", "Mul")  # between a product and the sum with its bias


class _Entry(NamedTuple):
    """Where a weight is: names of its initializer, scale and zero point, the axis of the scales."""

    tensor: str
    scale: str | None = None
    zero: str | None = None
    axis: int = 1
    transposed: bool = False


class OnnxFile(LazyTensors):
    """Weights by name, dequantized to float32 when asked for; floating ones as they are.

    A matrix that the graph leads to no name for keeps the name of its initializer.
    """

    def __init__(self, path: epath.PathLike) -> None:
        """Reads the file.

        Raises:
          StorageError: if the package `onnx` or the file is missing, the file is damaged, or two weights have one name.
        """
        try:
            import onnx
        except ImportError as e:
            raise StorageError(f"{path} needs the package onnx: pip install 'llm_jax[onnx]'") from e
        try:
            graph = onnx.load(str(path)).graph
        except Exception as e:
            raise StorageError(f"{path} is not an ONNX model: {type(e).__name__}: {str(e)[:200]}") from e
        self._array = onnx.numpy_helper.to_array
        self._tensors = {t.name: t for t in graph.initializer}
        walk = _Graph(graph.node, self._tensors)
        self._entries: dict[str, _Entry] = {}
        for tensor in graph.initializer:
            found = walk.entry(tensor.name, self._array(tensor))
            if found is None:
                continue
            name, entry = found
            if name in self._entries:
                raise StorageError(f"{path}: {entry.tensor} and {self._entries[name].tensor} are both {name}")
            self._entries[name] = entry
        for node in graph.node:  # weights that were equal when exported are stored once
            if node.op_type == "Identity" and node.input[0] in self._entries and _NAMED.fullmatch(node.output[0]):
                self._entries[node.output[0]] = self._entries[node.input[0]]

    def __getitem__(self, name: str) -> np.ndarray:
        """The weight as an array."""
        entry = self._entries[name]
        array = self._array(self._tensors[entry.tensor])
        if entry.scale is not None:
            scale = self._array(self._tensors[entry.scale])
            zero = np.zeros_like(scale) if entry.zero is None else self._array(self._tensors[entry.zero])
            shape = [-1 if i == entry.axis % array.ndim else 1 for i in range(array.ndim)] if scale.ndim else []
            steps = array.astype(np.int32) - zero.astype(np.int32).reshape(shape)
            array = steps.astype(np.float32) * scale.astype(np.float32).reshape(shape)
        return array.T if entry.transposed else array


class _Graph:
    """The nodes of a graph by the values that they make and read."""

    def __init__(self, nodes: Any, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.maker = {name: node for node in nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def entry(self, tensor: str, array: np.ndarray) -> tuple[str, _Entry] | None:
        """Name and entry of a weight; None for scales, zero points, shapes and constants."""
        found = _Entry(tensor)
        if not np.issubdtype(array.dtype, np.floating):
            quantized = self._quantized(tensor)
            if quantized is None:
                return None
            found = quantized
        elif array.size < 2 or self._is_scale(tensor):
            return None
        name = tensor.removesuffix("_quantized")
        if _NAMED.fullmatch(name):
            return name, found
        product = self._product(tensor)
        if product is None:
            return name, found
        stem = self._bias(product)
        transposed = product.op_type != "Gemm" or not _attribute(product, "transB", 0)
        return (name, found) if stem is None else (f"{stem}.weight", found._replace(transposed=transposed))

    def _quantized(self, tensor: str) -> _Entry | None:
        for node in self.readers.get(tensor, []):
            if node.op_type == "Gather" and node.input[0] == tensor:
                node = next((n for n in self.readers[node.output[0]] if n.op_type == "DequantizeLinear"), node)
            if node.op_type == "DequantizeLinear" and node.input[1] != tensor:
                if tensor in list(node.input[2:]):  # a zero point
                    return None
                if _attribute(node, "block_size", 0):
                    raise StorageError(f"{tensor} is quantized in blocks, which cannot be read")
                return _Entry(tensor, node.input[1], *node.input[2:3], axis=_attribute(node, "axis", 1))
            if node.op_type == "MatMulInteger" and node.input[1] == tensor:
                return _Entry(tensor, self._dynamic_scale(tensor, node), *node.input[3:4])
        return None

    def _dynamic_scale(self, tensor: str, product: Any) -> str:
        """The scale of w in `Mul(Cast(MatMulInteger(x, w)), Mul(scale of x, scale of w))`."""
        names = product.output
        for _ in range(2):
            names = [n for name in names for node in self.readers.get(name, []) for n in (*node.input, *node.output)]
        makers = [self.maker[n] for n in names if n in self.maker and self.maker[n].op_type == "Mul"]
        scales = {n for node in makers for n in node.input if n in self.tensors}
        if len(scales) != 1:
            raise StorageError(f"the scale of {tensor} is not where onnxruntime puts it")
        return scales.pop()

    def _is_scale(self, tensor: str) -> bool:
        quantizing = ("QuantizeLinear", "DequantizeLinear")
        if any(n.op_type in quantizing and n.input[1] == tensor for n in self.readers.get(tensor, [])):
            return True
        return tensor.endswith("_scale") and f"{tensor.removesuffix('_scale')}_quantized" in self.tensors

    def _product(self, tensor: str) -> Any:
        """The product that has this weight on its right, dequantized or not."""
        names = [tensor]
        names += [n.output[0] for n in self.readers.get(tensor, []) if n.op_type == "DequantizeLinear"]
        products = ("MatMul", "MatMulInteger", "Gemm")
        right = (
            n for name in names for n in self.readers.get(name, []) if n.op_type in products and n.input[1] == name
        )
        return next(right, None)

    def _bias(self, product: Any) -> str | None:
        """`X`, if the sum behind a product adds `X.bias`."""
        node = product
        while True:
            for name in node.input if node.op_type in ("Add", "Gemm") else ():
                while name in self.maker and self.maker[name].op_type == "DequantizeLinear":
                    name = self.maker[name].input[0]
                name = name.removesuffix("_quantized")
                if name.endswith(".bias") and _NAMED.fullmatch(name):
                    return name.removesuffix(".bias")
            following = self.readers.get(node.output[0], [])
            if len(following) != 1 or following[0].op_type not in (*_PASSED, "Add") or node.op_type == "Add":
                return None
            node = following[0]


def _attribute(node: Any, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)
