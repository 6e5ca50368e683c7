"""Safetensors files and folders: lazy views in, sharded files out.

A folder's model is `model.safetensors`, or else what `model.safetensors.index.json` names, or else all files except a
consolidated copy, a copy in another precision, or an adapter.

The library checks headers. Every tensor is then a separate memory map: nothing is read before it is used, and nothing
stays in memory when its view is dropped.
"""

import json
import logging
import os
import re
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


log = logging.getLogger(__name__)

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Meta's and Mistral's own layout, transformers' `variant`, peft
_BESIDE = re.compile(r"(consolidated.*|model\.[^.]+|adapter_model.*)\.safetensors")

Entry = tuple[BinaryIO, np.dtype, tuple[int, ...], int]  # open file, dtype, shape, offset of its bytes


class StorageError(ValueError):
    """A file that cannot be read as what it claims to be."""


def has_model(folder: epath.PathLike) -> bool:
    """Whether a folder holds safetensors of a model, not only copies and adapters."""
    return any(not _BESIDE.fullmatch(file.name) for file in epath.Path(folder).glob("*.safetensors"))


def files_of(folder: epath.PathLike) -> list[epath.Path]:
    """The files that hold a folder's model; files that are left out are logged.

    Raises:
      StorageError: if there is none, a file that the index names is missing, or nothing says which one is meant.
    """
    folder = epath.Path(folder)
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"), key=str)}
    if not files:
        raise StorageError(f"no *.safetensors in {folder}")
    index = folder / INDEX
    if FILE in files:
        chosen = [FILE]
    elif index.exists():
        try:
            chosen = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise StorageError(f"{index} is damaged: {e}") from e
        missing = [name for name in chosen if name not in files]
        if missing:
            raise StorageError(f"{folder} lacks {', '.join(missing)}, named in its index")
    else:
        chosen = [name for name in files if not _BESIDE.fullmatch(name)] or list(files)
        if len(chosen) > 1 and _BESIDE.fullmatch(chosen[0]):
            raise StorageError(f"{folder} holds {', '.join(chosen)} and no {FILE}: rename the one that is to be read")
    left = [name for name in files if name not in chosen] + [INDEX] * (FILE in files and index.exists())
    if left:
        log.warning("%s: reading %s, leaving %s", folder, ", ".join(chosen), ", ".join(left))
    return [files[name] for name in chosen]


class TensorFolder(LazyTensors):
    """All tensors of one file, or of a folder's model (`files_of`), as read-only views."""

    def __init__(self, path: epath.PathLike) -> None:
        """Reads the headers.

        Raises:
          StorageError: if there is no file, a header is damaged, a shard named by the index is missing, or a tensor
            is stored twice.
        """
        path = epath.Path(path)
        if not path.exists():
            raise StorageError(f"no *.safetensors in {path}")
        files = files_of(path) if path.is_dir() else [path]
        self._entries: dict[str, Entry] = {}
        owner: dict[str, str] = {}
        for file in files:
            for name, entry in _read(str(file), self):
                if name in self._entries:
                    raise StorageError(f"{name} is stored twice in {path}: in {owner[name]} and in {file.name}")
                self._entries[name], owner[name] = entry, file.name

    def __getitem__(self, name: str) -> np.ndarray:
        """A view of the tensor's bytes in the mapped file."""
        file, dtype, shape, offset = self._entries[name]
        if 0 in shape:  # which cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", offset, shape)


def open_for(owner: object, path: str) -> BinaryIO:
    """Opens a file that stays open until `owner` is deleted, whatever becomes of its path."""
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
        raise StorageError(f"{file} is not a readable safetensors file: {e}") from e
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise StorageError(f"{file}: {name} has dtype {entry['dtype']}, which is not supported")
        start = 8 + size + entry["data_offsets"][0]
        yield name, (data, np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), start)


def metadata(file: epath.PathLike) -> dict[str, str]:
    """The texts that a file holds beside its tensors.

    Raises:
      StorageError: if it is not a safetensors file.
    """
    try:
        with safetensors.safe_open(str(file), framework="np") as opened:
            return dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError) as e:
        raise StorageError(f"{file} is not a readable safetensors file: {e}") from e


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
    file = lambda i: FILE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
    for old in folder.glob("*.safetensors"):
        if old.name == FILE or _SHARD.fullmatch(old.name):
            old.unlink()
    index = folder / INDEX
    if index.exists():
        index.unlink()
    for i in range(count):
        os.replace(folder / f"shard-{i}.tmp", folder / file(i))
    if count > 1:
        weight_map = {name: file(i) for i, names in enumerate(shards) for name in names}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
