"""CTranslate2 on the peers' encoder-decoders: torch's weights in float32, as many threads as there are cores."""

import json
import os
import tempfile
from typing import Any

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter

from experiments.benchmark.peers.families import model_of
from experiments.benchmark.peers.runtime import CORES, median_seconds


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
