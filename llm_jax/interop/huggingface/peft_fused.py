"""One fused layer there, several kernels here: GPT-2's `c_attn` holds query, key and value.

Loading: B `[3D, r]` is cut in three, and all three share A `[r, D]`. Saving: equal As stay as they are, at rank r.
Other As are stacked and B is block-diagonal, at rank 3r and with alpha three times as large, so that the scale is the
same:

    A = [A_q; A_k; A_v]      B = [B_q  0    0  ]
                                 [0    B_k  0  ]
                                 [0    0    B_v]

Both are exact. The file's metadata says which columns are whose, so that what is saved so loads as it was; PEFT reads
past metadata.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

METADATA = "llm_jax.parts"


class Pair(NamedTuple):
    """LoRA on one matrix.

    Attributes:
      a: `[in, r]`.
      b: `[r, out]`.
      scale: factor of `a @ b`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The width between `a` and `b`."""
        return self.a.shape[-1]


def _is_shared(pairs: Sequence[Pair | None]) -> bool:
    first = pairs[0]
    return first is not None and all(
        p is not None and p.scale == first.scale and np.array_equal(p.a, first.a) for p in pairs
    )


def join(pairs: Sequence[Pair | None], widths: Sequence[int]) -> tuple[Pair, list[int] | None]:
    """LoRA on a fused layer from those on its parts.

    Args:
      pairs: one a part, None where a part has no LoRA; not all None.
      widths: outputs of the parts.

    Returns:
      (the pair; the ranks of the parts where they are side by side, None where they share A). Where scales differ, B
      takes up the difference, rounded once.
    """
    present = [p for p in pairs if p is not None]
    if len(pairs) == 1:
        return present[0], None
    if _is_shared(pairs):
        return present[0]._replace(b=np.concatenate([p.b for p in present], axis=1)), None
    scale, ranks = present[0].scale, [0 if p is None else p.rank for p in pairs]
    b = np.zeros((sum(ranks), sum(widths)), present[0].b.dtype)
    row, column = 0, 0
    for pair, rank, width in zip(pairs, ranks, widths, strict=True):
        if pair is not None:
            own = pair.b if pair.scale == scale else (pair.b * np.float64(pair.scale / scale)).astype(pair.b.dtype)
            b[row : row + rank, column : column + width] = own
        row, column = row + rank, column + width
    return Pair(np.concatenate([p.a for p in present], axis=1), b, scale), ranks


def split(pair: Pair, widths: Sequence[int], ranks: Sequence[int] | None = None) -> list[Pair | None]:
    """Undoes `join`; without `ranks` every part gets A and its piece of B."""
    pieces = cut(pair.b, widths)
    if ranks is None or sum(ranks) != pair.rank or len(ranks) != len(widths):
        return [pair._replace(b=piece) for piece in pieces]
    out: list[Pair | None] = []
    for piece, rank, start in zip(pieces, ranks, np.cumsum([0, *ranks[:-1]]), strict=True):
        columns = slice(start, start + rank)
        if np.count_nonzero(piece) > np.count_nonzero(piece[columns]):  # trained on as one layer
            return [pair._replace(b=piece) for piece in pieces]
        out.append(Pair(pair.a[:, columns], piece[columns], pair.scale) if rank else None)
    return out


def cut(array: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    """The parts' pieces of an array's last axis."""
    return np.split(array, np.cumsum(widths)[:-1], axis=-1)
