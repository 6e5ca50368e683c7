"""ONNX Runtime on the peers' encoders: torch's weights in float32, as many threads as there are cores."""

import tempfile
from typing import Any

import onnx  # noqa: F401  torch's exporter needs it
import onnxruntime
import onnxscript  # noqa: F401
import torch

from experiments.benchmark.peers.families import model_of
from experiments.benchmark.peers.runtime import CORES, median_seconds


def encode(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second through an encoder in ONNX Runtime."""
    model = model_of(spec).eval()
    rows, length = spec["shape"]
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/model.onnx"
        with torch.inference_mode():
            torch.onnx.export(model, (ids,), path, input_names=["input_ids"], dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {"input_ids": ids.numpy()}
        seconds = median_seconds(lambda: session.run(None, feed), 10)
    return {"value": rows * length / seconds}
