"""ONNX graphs as exporters and onnxruntime's quantization write them: linear layers, tables, norms."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

FORMS = ("matmul", "gemm", "gemm_turned", "static", "static_unsigned", "static_channels", "dynamic", "dynamic_channels")


def quantized(array, dtype, axis=None):
    """(integers, scale, zero point), of the whole array or along an axis."""
    over = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    low, high = array.min(over), array.max(over)
    if dtype == np.uint8:
        scale = ((high - low) / 255).astype(np.float32)
        zero = np.round(-low / scale).astype(dtype)
    else:
        scale = (np.maximum(-low, high) / 127).astype(np.float32)
        zero = np.zeros_like(scale, dtype)
    shape = [1] * array.ndim
    if axis is not None:
        shape[axis] = -1
    limits = np.iinfo(dtype)
    steps = np.round(array / scale.reshape(shape)) + zero.reshape(shape)
    return np.clip(steps, limits.min, limits.max).astype(dtype), scale, zero


def dequantized(values, scale, zero, axis=None):
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    return (values.astype(np.int32) - zero.astype(np.int32).reshape(shape)).astype(np.float32) * scale.reshape(shape)


class Graph:
    """Collects nodes and initializers; what the reader must find is in `weights`."""

    def __init__(self):
        self.nodes, self.tensors, self.weights, self.count = [], [], {}, 0

    def node(self, kind, inputs, outputs=None, **attributes):
        self.count += 1
        outputs = outputs or [f"/n{self.count}/{kind}_output_0"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def tensor(self, name, array):
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def parts(self, name, values, scale, zero):
        return [
            self.tensor(f"{name}_{part}", a)
            for part, a in (("quantized", values), ("scale", scale), ("zero_point", zero))
        ]

    def passed(self, value):
        """An activation through QuantizeLinear and DequantizeLinear, as static quantization puts them everywhere."""
        ends = [self.tensor(f"{value}_scale", np.float32(0.1)), self.tensor(f"{value}_zero_point", np.int8(3))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *ends]), *ends])

    def linear(self, name, weight, bias, form, x="x"):
        """`x @ weight.T + bias` for a module called `name`, its matrix nameless where exporters lose its name."""
        bias_name, lost = f"{name}.bias", f"onnx::MatMul_{700 + self.count}"
        dtype = np.uint8 if form == "static_unsigned" else np.int8
        axis = 1 if form.endswith("channels") else None
        found = weight
        if form.startswith("gemm"):
            turned = form == "gemm_turned"
            inputs = [x, self.tensor(lost, weight if turned else weight.T), self.tensor(bias_name, bias)]
            y = self.node("Gemm", inputs, **({"transB": 1} if turned else {}))
        elif form == "matmul":
            y = self.node("MatMul", [x, self.tensor(lost, weight.T)])
            y = self.node("Add", [self.tensor(bias_name, bias), y])
        else:
            values = quantized(weight.T, dtype, axis)
            found = dequantized(*values, axis).T
            q, scale, zero = self.parts(lost, *values)
            if form.startswith("static"):
                w = self.node("DequantizeLinear", [q, scale, zero], **({} if axis is None else {"axis": axis}))
                y = self.passed(self.node("MatMul", [self.passed(x), w]))
            else:
                x, x_scale, x_zero = (f"{x}_{part}" for part in ("quantized", "scale", "zero_point"))
                y = self.node("Cast", [self.node("MatMulInteger", [x, q, x_zero, zero])], to=TensorProto.FLOAT)
                y = self.node("Mul", [y, self.node("Mul", [x_scale, scale])])
            y = self.node("Add", [self.tensor(bias_name, bias), y])
        self.weights |= {f"{name}.weight": found, bias_name: bias}
        return y

    def plain(self, name, array):
        """A norm's scale, say."""
        self.weights[self.tensor(name, array)] = array

    def table(self, name, array, form):
        """Rows by number."""
        if not form.startswith(("static", "dynamic")):
            self.node("Gather", [self.tensor(name, array), "ids"])
            self.weights[name] = array
            return
        values = quantized(array, np.int8)
        q, scale, zero = self.parts(name, *values)
        if form.startswith("static"):
            self.node("Gather", [self.node("DequantizeLinear", [q, scale, zero]), "ids"])
        else:
            self.node("DequantizeLinear", [self.node("Gather", [q, "ids"]), scale, zero])
        self.weights[name] = dequantized(*values)

    def write(self, path):
        graph = helper.make_graph(self.nodes, "graph", [], [], self.tensors)
        save(helper.make_model(graph), str(path))
