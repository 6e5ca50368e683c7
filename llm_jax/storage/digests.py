"""Digests of files, computed again only where a file may have changed.

A digest is stored beside the file's size and times. While these stay and the machine was not restarted, the digest
stands for the content and the file is not read. The kernel sets the second time (ctime) at every write, whatever a
program says of the first (mtime), so a copy that keeps size and mtime is noticed too. After a restart, and so after a
crash, every file is read once more.
"""

import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from etils import epath

from llm_jax.storage.text_files import write_whole

BLOCK = 1 << 20  # bytes read at once
TICK = 0.01  # seconds between two times that a kernel can tell apart: Linux has 100 or more ticks a second
BOOT = "/proc/sys/kernel/random/boot_id"


class FileDigest(NamedTuple):
    """A file as it was when it was read.

    Attributes:
      size: bytes.
      modified: mtime, nanoseconds.
      changed: ctime, nanoseconds; 0 for a remote file.
      boot: which start of the machine the times are from; empty where the system does not say.
      digest: blake2b of the content, hexadecimal.
    """

    size: int
    modified: int
    changed: int
    boot: str
    digest: str

    def is_current(self, path: epath.PathLike) -> bool:
        """Whether the file has the same size and times, since the same start of the machine."""
        try:
            return bool(self.boot) and self[:4] == stamp(path)
        except OSError:
            return False


@functools.cache
def _boot() -> str:
    file = pathlib.Path(BOOT)
    return file.read_text().strip() if file.exists() else ""


def stamp(path: epath.PathLike) -> tuple[int, int, int, str]:
    """(size, modified, changed, boot) of a file, see `FileDigest`."""
    if "://" in str(path):
        remote = epath.Path(path).stat()
        return remote.length, int(remote.mtime * 1e9), 0, _boot()
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, _boot()


def settle(path: epath.PathLike) -> None:
    """Waits until a file that was just written is old enough that another write gives it another time."""
    _, modified, changed, _ = stamp(path)
    latest = max(modified, changed)
    tick = TICK if latest % 10**9 else 2.0  # some file systems keep whole or even seconds only
    age = time.time() - latest / 1e9
    if 0 <= age < tick:
        time.sleep(tick - age)


def digest_file(path: epath.PathLike, digest_size: int = 32) -> FileDigest:
    """Reads a file, a block at a time; the digest has `digest_size` bytes."""
    settle(path)
    before = stamp(path)  # what is written while we read gets a later time
    digest = hashlib.blake2b(digest_size=digest_size)
    with epath.Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return FileDigest(*before, digest.hexdigest())


def digest_files(
    paths: Iterable[epath.PathLike], stored: Mapping[str, FileDigest] | None = None
) -> dict[str, FileDigest]:
    """Digests by path.

    Args:
      paths: the files.
      stored: digests of earlier reads; a file that has the same size and times is not read again.
    """

    def digest(path: epath.PathLike) -> FileDigest:
        earlier = (stored or {}).get(str(path))
        return earlier if earlier is not None and earlier.is_current(path) else digest_file(path)

    return {str(path): digest(path) for path in paths}


def save(file: epath.PathLike, digests: Mapping[str, FileDigest]) -> None:
    """Writes digests; the file is whole, or as it was."""
    write_whole(file, json.dumps(digests, indent=1) + "\n")


def load(file: epath.PathLike) -> dict[str, FileDigest]:
    """What `save` wrote; nothing where the file is missing.

    Raises:
      ValueError: if it is damaged.
    """
    file = epath.Path(file)
    if not file.exists():
        return {}
    try:
        found = {name: FileDigest(*values) for name, values in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is damaged: {e}") from e
    kinds = (int, int, int, str, str)
    if not all(isinstance(x, kind) for values in found.values() for x, kind in zip(values, kinds, strict=True)):
        raise ValueError(f"{file} is damaged: it holds other values than sizes, times and digests")
    return found
