"""Safetensors files and folders: lazy views in, sharded files out.

The library checks headers; every tensor asked for is then a memory map of its own, so nothing is read before it is
used, and nothing stays in memory when its view is dropped.
"""

import json
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from llm_jax.storage.lazy import LazyTensors

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


Entry = tuple[BinaryIO, np.dtype, tuple[int, ...], int]  # open file, dtype, shape, where its bytes begin


class StorageError(ValueError):
    """A file that cannot be read as what it claims to be."""


class TensorFolder(LazyTensors):
    """All tensors of one file, or of every `*.safetensors` in a folder, as read-only views."""

    def __init__(self, path: epath.PathLike) -> None:
        """Reads the headers.

        Raises:
          StorageError: if there is no file, a header is damaged, a shard named by the index is missing, or a tensor
            is stored twice.
        """
        path = epath.Path(path)
        files = sorted(path.glob("*.safetensors"), key=str) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise StorageError(f"no *.safetensors in {path}")
        index = path / "model.safetensors.index.json"
        if path.is_dir() and index.exists():
            try:
                named = set(map(str, json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as e:
                raise StorageError(f"{index} is damaged: {e}") from e
            missing = named - {f.name for f in files}
            if missing:
                raise StorageError(f"{path} lacks {', '.join(sorted(missing))}, named in its index")
            files = [f for f in files if f.name in named]
        self._entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _read(str(file), self):
                if name in self._entries:
                    raise StorageError(f"{name} is stored twice in {path}")
                self._entries[name] = entry

    def __getitem__(self, name: str) -> np.ndarray:
        """A view."""
        file, dtype, shape, offset = self._entries[name]
        if 0 in shape:  # which cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", offset, shape)


def open_for(owner: object, path: str) -> BinaryIO:
    """A file that stays open, whatever becomes of its path, until `owner` goes."""
    file = open(path, "rb")  # noqa: SIM115
    weakref.finalize(owner, file.close)
    return file


def _read(file: str, owner: object) -> Iterator[tuple[str, Entry]]:
    try:
        with safetensors.safe_open(file, framework="np") as checked:  # validates header, offsets and sizes
            names = list(checked.keys())
        data = open_for(owner, file)
        size = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(size))
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as e:
        raise StorageError(f"{file} is no readable safetensors file: {e}") from e
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise StorageError(f"{file}: {name} has dtype {entry['dtype']}, which is not supported")
        start = 8 + size + entry["data_offsets"][0]
        yield name, (data, np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), start)


def write_folder(path: epath.PathLike, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 2 * 2**30) -> None:
    """Writes tensors as they come, in shards of about `shard_bytes`; one shard needs no index.

    Every file is written under another name first and then renamed, so a full disk leaves no broken file behind.

    Raises:
      StorageError: where the disk refuses.
    """
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if not pending:
            return
        name = folder / f"shard-{len(shards)}.tmp"
        try:
            save_file(dict(pending), str(name), metadata={"format": "pt"})
        except (OSError, safetensors.SafetensorError) as e:
            for left in folder.glob("shard-*.tmp"):
                left.unlink()
            raise StorageError(f"{folder} could not be written: {e}") from e
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = np.asarray(array, order="C")  # ascontiguousarray would turn scalars into vectors
        total += array.nbytes
    flush()
    count = len(shards)
    file = lambda i: "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
    for old in folder.glob("*.safetensors"):
        old.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
    for i in range(count):
        os.replace(folder / f"shard-{i}.tmp", folder / file(i))
    if count > 1:
        weight_map = {name: file(i) for i, names in enumerate(shards) for name in names}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
