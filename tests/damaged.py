"""Damaged files, hundreds of them: each is loaded or refused, and memory stays small."""

import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

from llm_jax.storage.safetensors import StorageError


def outcomes_of(path: Any, variants: Iterable[bytes], read: Callable[[int], None]) -> tuple[dict[str, int], int]:
    """Counts what was loaded and what refused in one line, and gives the peak of traced memory in bytes.

    Args:
      path: each variant is written here.
      variants: contents of damaged files.
      read: reads everything at `path`, checks it against the file's size in bytes.
    """
    outcomes = {"loaded": 0, "refused": 0}
    tracemalloc.start()
    for data in variants:
        path.write_bytes(data)
        try:
            read(len(data))
            outcomes["loaded"] += 1
        except StorageError as e:
            assert "\n" not in str(e)
            outcomes["refused"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return outcomes, peak
