"""Arrays in memory-mapped files, for state that is larger than memory, and a thread that reads ahead.

The system loads and drops a file's pages by itself; reading copies, so memory holds only the pieces in use.
"""

import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from numpy.lib import format as npy

from llm_jax.storage.lazy import LazyTensors


class Ahead:
    """Reads the arrays that will be needed next, in a thread.

    The entry that followed an entry the last time is expected to follow it again; at first, the next number of its
    group.
    """

    def __init__(self, read: Callable[[Any, int], Any], counts: Mapping[Any, int]) -> None:
        """Reads nothing yet.

        Args:
          read: `(group, number) -> arrays`.
          counts: how many numbers each group has.
        """
        self._read, self._counts = read, counts
        self._pool, self._lock = ThreadPoolExecutor(1), threading.Lock()
        self._follower: dict[Hashable, tuple[Any, int]] = {}
        self._last: Hashable = None
        self._next: tuple[Hashable, Future[Any]] | None = None

    def __call__(self, group: Any, number: int) -> Any:
        """The arrays of an entry, once they are read; begins to read the next ones."""
        with self._lock:
            entry = group, number
            begun = self._next[1] if self._next and self._next[0] == entry else None
            value = (begun or self._pool.submit(self._read, *entry)).result()
            if self._last is not None:
                self._follower[self._last] = entry
            self._last = entry
            expected = self._follower.get(entry, (group, (number + 1) % self._counts[group]))
            # a single entry may be written before it is read again
            self._next = None if expected == entry else (expected, self._pool.submit(self._read, *expected))
            return value


class Declared(NamedTuple):
    """An array that has no file yet."""

    shape: tuple[int, ...]
    dtype: np.dtype


class MappedArrays(LazyTensors):
    """Arrays by name, each in `folder/<name>.npy`; the folder is scratch, made anew by every run."""

    def __init__(self, folder: epath.PathLike, declared: Mapping[str, Declared]) -> None:
        """Makes no file yet.

        Args:
          folder: local.
          declared: what there will be.

        Raises:
          ValueError: if the folder is not local.
        """
        if "://" in str(folder):
            raise ValueError(f"files cannot be memory-mapped in {folder}: take a local folder")
        self.folder, self._entries = pathlib.Path(folder), dict(declared)

    def declared(self, name: str) -> Declared:
        """Shape and dtype of an array."""
        return self._entries[name]

    def file(self, name: str) -> pathlib.Path:
        """The file of an array."""
        return self.folder / f"{name}.npy"

    def fill(self, name: str, value: Any = None) -> None:
        """Makes an array's file, of zeros by default.

        Raises:
          OSError: if the disk has no room. Without this check the process would be killed when a page is written.
        """
        shape, dtype = self._entries[name]
        file = self.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        array = npy.open_memmap(file, "w+", dtype, shape)
        size = file.stat().st_size
        try:
            with file.open("r+b") as f:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(f.fileno(), 0, size)
        except OSError as e:
            raise OSError(e.errno, f"no room for {size:,} bytes ({e.strerror})", str(file)) from e
        if value is not None:
            array[...] = value
            array.flush()

    def __getitem__(self, name: str) -> np.ndarray:
        """A map of the file, to read and to write; deleting the map gives its pages back."""
        _ = self._entries[name]
        return npy.open_memmap(self.file(name), "r+")

    def remove(self) -> None:
        """Removes the folder of files."""
        shutil.rmtree(self.folder, ignore_errors=True)
