"""Specialised inference engines on the peers' models: CTranslate2 for encoder-decoders, ONNX Runtime for encoders.

`python -m experiments.benchmark.engines SPEC` prints one JSON line, or exits with 42 where one is not installed. Both
take torch's weights in float32 and as many threads as there are cores.
"""

import json
import os
import sys
import tempfile
from typing import Any

from experiments.benchmark.families_peers import model_of
from experiments.benchmark.peers import median_seconds, torch

try:
    import ctranslate2
    import onnx  # noqa: F401  torch's exporter needs it
    import onnxruntime
    import onnxscript  # noqa: F401
    from ctranslate2.converters import TransformersConverter
except ImportError:
    sys.exit(42)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Numbers:
    """A tokenizer whose tokens are the numbers of their entries: the converter asks for names only."""

    def __init__(self, config: Any) -> None:
        self.size, self.marian = config.vocab_size, config.model_type == "marian"
        self.eos_token, self.unk_token, self.bos_token = str(config.eos_token_id), "2", "2"
        self.pad_token = str(config.pad_token_id)

    def get_vocab(self) -> dict[str, int]:
        names = [str(i) for i in range(self.size)]
        if self.marian:  # whose padding the converter drops by its name
            names[-1] = "<pad>"
        return {name: i for i, name in enumerate(names)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return str(index)


class _Converter(TransformersConverter):  # type: ignore[misc]
    def load_tokenizer(self, tokenizer_class: Any, path: str, **options: Any) -> Any:
        del tokenizer_class, options
        with open(os.path.join(path, "config.json")) as f:
            return _Numbers(type("Config", (), json.load(f)))


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second of CTranslate2, the source's reading included; no output ends early."""
    model = model_of(spec).eval()
    rows, new = spec["batch"], spec["new"]
    ids = torch.randint(3, model.config.vocab_size - 1, (rows, spec["source"])).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _Converter(folder).convert(folder + "/engine", quantization="float32")
        engine = ctranslate2.Translator(folder + "/engine", intra_threads=CORES, compute_type="float32")
        sources = [[str(i) for i in row] for row in ids]
        options = dict(beam_size=spec["beams"], max_decoding_length=new, min_decoding_length=new)
        seconds = median_seconds(lambda: engine.translate_batch(sources, **options), 3, warm=1)
    return {"value": rows * new / seconds}


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


WHAT = {"encode": encode, "decode": decode}

if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WHAT[wanted["what"]](wanted)))
