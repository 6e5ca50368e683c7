"""Huffman's tree over words: frequent ones have short ways from the root.

Source: Huffman 1952; Morin and Bengio 2005 and Mikolov et al. 2013, https://arxiv.org/abs/1310.4546, section 2.1.
"""

import heapq
from typing import NamedTuple

import numpy as np


class Paths(NamedTuple):
    """The way from the root to every word.

    Attributes:
      nodes: inner nodes passed, int32 `[V, P]`; the root is V - 2.
      signs: +1 where the way goes to the first child, -1 to the second, 0 before its beginning; float32 `[V, P]`.
    """

    nodes: np.ndarray
    signs: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Path length of every word, `[V]`."""
        return np.abs(self.signs).sum(1).astype(int)


def paths(counts: np.ndarray) -> Paths:
    """The tree of `counts`, `[V]`: the two rarest are joined again and again.

    Raises:
      ValueError: for fewer than two words.
    """
    size = len(counts)
    if size < 2:
        raise ValueError(f"a tree needs two words, not {size}: take a smaller min_count, or negative_sampling")
    heap = [(int(n), i) for i, n in enumerate(counts)]
    heapq.heapify(heap)
    parent, sign = np.zeros(2 * size - 1, np.int64), np.zeros(2 * size - 1, np.float32)
    for inner in range(size, 2 * size - 1):
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        for child, side in ((first, 1), (second, -1)):
            parent[child[1]], sign[child[1]] = inner, side
        heapq.heappush(heap, (first[0] + second[0], inner))
    root, at = 2 * size - 2, np.arange(size)
    nodes, signs = [], []
    while (at != root).any():  # up from all words at once
        below = at != root
        nodes.append(np.where(below, parent[at] - size, 0))
        signs.append(np.where(below, sign[at], 0))
        at = np.where(below, parent[at], root)
    return Paths(np.stack(nodes[::-1], 1).astype(np.int32), np.stack(signs[::-1], 1).astype(np.float32))
