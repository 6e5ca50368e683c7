"""Where a model is, and its tensors: local folders, the hub, and every file format that may lie in a folder."""

import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from llm_jax.interop.names import InteropError
from llm_jax.storage import flax_msgpack, safetensors
from llm_jax.storage.onnx import OnnxFile
from llm_jax.storage.safetensors import TensorFolder

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find(path: epath.PathLike) -> epath.Path:
    """The local file or folder; a repository of the hub (`org/name`) is fetched first, without its pickles.

    Raises:
      InteropError: if there is nothing.
    """
    found = epath.Path(path)
    if found.exists():
        return found
    if not _REPOSITORY.fullmatch(str(path)):
        raise InteropError(f"no model at {path}")
    try:
        import huggingface_hub
    except ImportError as e:
        raise InteropError(f"no folder {path}; to fetch it from the hub: pip install 'llm_jax[hub]'") from e
    try:
        for tensors in ("*.safetensors", flax_msgpack.PATTERN):
            small = ["*.json", "*.jinja", "*.spm", "spiece.model", "merges.txt", "vocab.txt"]
            folder = epath.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=[*small, tensors]))
            if safetensors.has_model(folder):
                break
        return folder
    except Exception as e:
        raise InteropError(f"{path} is not a local folder and could not be fetched from the hub: {e}") from e


def tensors_of(path: epath.Path) -> Mapping[str, np.ndarray]:
    """Tensors of a folder by name: safetensors, or else an old Flax file, or else an ONNX graph; never a pickle.

    Raises:
      InteropError: if it holds pickles only, or several ONNX graphs.
      StorageError: if it holds none of them.
    """
    if not safetensors.has_model(path):
        if flax_msgpack.is_in(path):
            return flax_msgpack.read(path)
        graphs = sorted(p.name for p in path.glob("*.onnx"))
        if len(graphs) > 1:
            raise InteropError(f"{path} holds {', '.join(graphs)}: leave the one that is to be read")
        if graphs:
            return OnnxFile(path / graphs[0])
        pickles = sorted(p.name for suffix in PICKLES for p in path.glob(f"*{suffix}"))
        if pickles and not any(path.glob("*.safetensors")):
            raise InteropError(
                f"{path} holds pickles only ({pickles[0]}), which are never read: convert to safetensors"
            )
    return TensorFolder(path)
