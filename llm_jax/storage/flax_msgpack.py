"""`flax_model.msgpack`: what Flax in transformers 4 wrote, read under the names and layouts of its PyTorch twin.

transformers 5 dropped these classes; the folders are still there. Source: transformers 4's
`modeling_flax_pytorch_utils.py`, whose renaming this undoes: kernels were the transpose of `weight`, tables were called
`embedding` and norms' weights `scale`, and ALBERT's two lists of layers went under `layers`.
"""

from typing import Any

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from llm_jax.storage.safetensors import StorageError

FILE = "flax_model.msgpack"


def _rename(path: tuple[str, ...]) -> str:
    *front, last = path
    last = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(last, last)
    return (
        ".".join((*front, last))
        .replace("layer_groups.layers.", "layer_groups.")
        .replace("albert_layers.layers.", "albert_layers.")
    )


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a folder's `flax_model.msgpack`, held in memory at once (the format has no index).

    Only arrays come out of the file: there is no code in it, as in a pickle.

    Raises:
      StorageError: if it is missing or damaged, or holds something else than arrays.
    """
    file = epath.Path(path) / FILE
    try:
        tree: Any = serialization.msgpack_restore(file.read_bytes())
        flat = traverse_util.flatten_dict(tree)
    except FileNotFoundError as e:
        raise StorageError(f"no {FILE} in {path}") from e
    except Exception as e:
        raise StorageError(f"{file} is damaged: {type(e).__name__}: {str(e)[:100]}") from e
    out = {}
    for key, array in flat.items():
        if not isinstance(array, np.ndarray) or not all(isinstance(k, str) for k in key):
            raise StorageError(f"{file} is damaged: {key} is no array")
        out[_rename(key)] = array.T if key[-1] == "kernel" else array
    return out
