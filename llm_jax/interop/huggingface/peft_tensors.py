"""The tensors of an adapter's file, each of which must find a home."""

import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from llm_jax.interop.huggingface import peft_fused, peft_names
from llm_jax.interop.huggingface.peft_names import PREFIX
from llm_jax.interop.names import InteropError
from llm_jax.storage import safetensors

FILE = "adapter_model.safetensors"


class Tensors:
    """The tensors of an adapter by name, without PEFT's prefix; each is taken once, and none may be left."""

    def __init__(self, folder: epath.Path) -> None:
        """Reads all of them; an adapter is small.

        Raises:
          InteropError: naming a tensor that holds NaN or infinity, or if our note of parts is damaged.
        """
        file = folder / FILE
        stored = safetensors.TensorFolder(file if file.exists() else folder)
        self.folder = folder
        self.arrays = {name.removeprefix(PREFIX): np.asarray(stored[name]) for name in stored}
        for name, array in self.arrays.items():
            if not np.all(np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array)):
                raise InteropError(f"{folder}: {PREFIX}{name} holds numbers that are not finite")
        metadata = safetensors.metadata(file) if file.exists() else {}
        try:
            self.parts: dict[str, list[int]] = dict(json.loads(metadata.get(peft_fused.METADATA, "{}")))
        except (ValueError, TypeError) as e:
            raise InteropError(f"{file}: its note {peft_fused.METADATA} is damaged: {e}") from e

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor of this name and shape.

        Raises:
          InteropError: if it is missing or has another shape.
        """
        if name not in self.arrays:
            raise InteropError(f"{self.folder} lacks {PREFIX}{name}")
        array = self.arrays.pop(name)
        if array.shape != tuple(shape):
            text = peft_names.shape_text
            raise InteropError(f"{self.folder}: {PREFIX}{name} has shape {text(array.shape)}, expected {text(shape)}")
        return array
