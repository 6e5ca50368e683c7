"""GGUF files: metadata and tensors, dequantized one at a time by the `gguf` package."""

import os
import struct
from typing import Any

import numpy as np
from etils import epath

from llm_jax.storage.lazy import LazyTensors
from llm_jax.storage.safetensors import StorageError, open_for

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type: bytes
_STRING, _ARRAY = 8, 9


def _check_header(path: str) -> None:
    """Walks the header with bounds checks, so that a damaged one cannot make the reader allocate or loop.

    Raises:
      StorageError: where a count, length or type cannot be right.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:

        def take(form: str) -> int:
            data = f.read(struct.calcsize(form))
            if len(data) < struct.calcsize(form):
                raise StorageError(f"{path} is cut short")
            return int(struct.unpack(form, data)[0])

        def skip(count: int) -> None:
            if count < 0 or f.tell() + count > size:
                raise StorageError(f"{path} is damaged: an entry reaches past the end of the file")
            f.seek(count, os.SEEK_CUR)

        def value(kind: int, depth: int = 0) -> None:
            if kind in _SCALARS:
                skip(_SCALARS[kind])
            elif kind == _STRING:
                skip(take("<Q"))
            elif kind == _ARRAY and depth < 4:
                inner, count = take("<I"), take("<Q")
                if count > size:
                    raise StorageError(f"{path} is damaged: an array of {count} entries")
                if inner in _SCALARS:
                    skip(count * _SCALARS[inner])
                else:
                    for _ in range(count):
                        value(inner, depth + 1)
            else:
                raise StorageError(f"{path} is damaged: value type {kind}")

        if f.read(4) != b"GGUF":
            raise StorageError(f"{path} is not a GGUF file")
        version, tensors, entries = take("<I"), take("<Q"), take("<Q")
        if version not in (2, 3):
            raise StorageError(f"{path} has GGUF version {version}; 2 and 3 are supported (little-endian)")
        if tensors > size // 24 or entries > size // 12:
            raise StorageError(f"{path} is damaged: {tensors} tensors and {entries} entries cannot fit")
        for _ in range(entries):
            skip(take("<Q"))
            value(take("<I"))
        for _ in range(tensors):
            skip(take("<Q"))
            dims = take("<I")
            if dims > 4:
                raise StorageError(f"{path} is damaged: a tensor of {dims} dimensions")
            total = 1
            for _ in range(dims):
                total *= take("<Q")
            kind, offset = take("<I"), take("<Q")
            if total > size * 32 or offset > size or kind > 100:
                raise StorageError(f"{path} is damaged: a tensor of {total} numbers, type {kind}, at {offset}")


class GgufFile(LazyTensors):
    """Tensors by name, float32 (float16 and bfloat16 stay), dequantized when asked for.

    Attributes:
      metadata: key-value entries.
    """

    def __init__(self, path: epath.PathLike) -> None:
        """Reads the header.

        Raises:
          StorageError: if the file is missing or damaged.
        """
        import gguf

        path = str(path)
        if not os.path.exists(path):
            raise StorageError(f"no GGUF file at {path}")
        _check_header(path)
        try:
            self._file = open_for(self, path)
            reader = gguf.GGUFReader(path)  # not stored: it keeps two arrays for every entry of the vocabulary
            self._entries = {
                t.name: (t.tensor_type, t.data.dtype, int(t.data_offset), t.data.shape, tuple(t.shape.tolist()))
                for t in reader.tensors
            }
            self.metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        except Exception as e:
            raise StorageError(f"{path} is damaged: {type(e).__name__}: {str(e)[:200]}") from e
        self._dequantize = gguf.dequantize

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order, `[out, in]` for matrices."""
        return self._entries[name][-1][::-1]

    def __getitem__(self, name: str) -> np.ndarray:
        """The dequantized tensor.

        Raises:
          StorageError: if its quantization type is unknown.
        """
        kind, dtype, offset, shape, _ = self._entries[name]
        try:
            stored = np.memmap(self._file, dtype, "r", offset, shape)  # a new map, whose pages go with the array
            data = self._dequantize(stored, kind)
        except Exception as e:
            raise StorageError(f"{name} has type {kind.name}, which cannot be read: {e}") from e
        return data.reshape(self.shape(name))
