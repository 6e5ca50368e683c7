"""`flax_model.msgpack`, whole or in shards: what Flax in transformers 4 wrote, under names of its PyTorch twin.

transformers 5 dropped these classes; the folders are still there. Source: transformers 4's
`modeling_flax_pytorch_utils.py`, whose renaming this undoes: kernels were the transpose of `weight`, tables were called
`embedding` and norms' weights `scale`, and ALBERT's two lists of layers went under `layers`.
"""

import json
from typing import Any

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from llm_jax.storage.safetensors import StorageError

FILE = "flax_model.msgpack"
INDEX = f"{FILE}.index.json"
PATTERN = "flax_model*.msgpack"  # file and shards


def _rename(path: tuple[str, ...]) -> str:
    *front, last = path
    last = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(last, last)
    return (
        ".".join((*front, last))
        .replace("layer_groups.layers.", "layer_groups.")
        .replace("albert_layers.layers.", "albert_layers.")
    )


def is_in(path: epath.PathLike) -> bool:
    """Whether a folder holds such a model."""
    return any((epath.Path(path) / name).exists() for name in (FILE, INDEX))


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a folder's `flax_model.msgpack` or of its shards; all are in memory at once.

    The format has no table of where a tensor lies. Only arrays come out of a file: there is no code in it, unlike in a
    pickle.

    Raises:
      StorageError: if a file is missing or damaged, or holds something else than arrays.
    """
    folder = epath.Path(path)
    if (folder / FILE).exists() or not (folder / INDEX).exists():
        return _read(folder, FILE)
    try:
        weight_map = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        shards = sorted(set(map(str, weight_map.values())))
    except (ValueError, KeyError, TypeError) as e:
        raise StorageError(f"{folder / INDEX} is damaged: {type(e).__name__}: {e}") from e
    out: dict[str, np.ndarray] = {}
    for shard in shards:
        out |= _read(folder, shard)
    missing = sorted({_rename(tuple(name.split("/"))) for name in weight_map} - out.keys())
    if missing:
        raise StorageError(f"{folder}: {missing[0]} is in none of {', '.join(shards)}, though {INDEX} says so")
    return out


def _read(folder: epath.Path, name: str) -> dict[str, np.ndarray]:
    file = folder / name
    try:
        tree: Any = serialization.msgpack_restore(file.read_bytes())
        flat = traverse_util.flatten_dict(tree)
    except FileNotFoundError as e:
        raise StorageError(f"no {name} in {folder}") from e
    except Exception as e:
        raise StorageError(f"{file} is damaged: {type(e).__name__}: {str(e)[:100]}") from e
    out = {}
    for key, array in flat.items():
        if not isinstance(array, np.ndarray) or not all(isinstance(k, str) for k in key):
            raise StorageError(f"{file} is damaged: {key} is not an array")
        out[_rename(key)] = array.T if key[-1] == "kernel" else array
    return out
