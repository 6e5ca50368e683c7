"""The base of all files of tensors: a mapping that reads a tensor when it is asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name; a subclass fills `_entries` and reads a tensor in `__getitem__`.

    Names, number and membership read nothing (`Mapping` alone would read a tensor to learn whether it is there).
    """

    _entries: dict[str, Any]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of this name exists."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of tensors in the file."""
        return len(self._entries)
