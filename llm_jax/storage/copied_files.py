"""Files of mapped arrays inside a checkpoint: copied whole, since they are never in memory as a whole."""

import dataclasses
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from numpy.lib import format as npy

from llm_jax.storage.mapped import MappedArrays


class _Handler(ocp.CheckpointHandler):
    def save(self, directory: epath.Path, args: "CopyFiles") -> None:
        for name in args.arrays:
            to = directory / f"{name}.npy"
            to.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(args.arrays.file(name)).copy(to, overwrite=True)

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        raise NotImplementedError(f"files of {directory} are opened one by one")


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class CopyFiles(ocp.args.CheckpointArgs):
    """An item of a checkpoint: the files of these arrays."""

    arrays: MappedArrays


def files_in(folder: epath.Path) -> dict[str, epath.Path]:
    """The copied files of a checkpoint's item by the array that each holds; none where there is no such item."""
    found = _below(folder) if folder.exists() else []
    return {str(f.relative_to(folder)).removesuffix(".npy"): f for f in found if f.suffix == ".npy"}


def _below(folder: epath.Path) -> list[epath.Path]:
    return [f for path in folder.iterdir() for f in (_below(path) if path.is_dir() else [path])]


def open_array(file: epath.Path) -> np.ndarray:
    """The array of a `.npy` file; mapped where the file is local."""
    if "://" not in str(file):
        return np.load(str(file), mmap_mode="r")
    with file.open("rb") as f:
        return np.load(f)


def header(file: epath.Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a `.npy` file."""
    with file.open("rb") as f:
        npy.read_magic(f)
        shape, _, dtype = npy.read_array_header_1_0(f)
    return shape, dtype
