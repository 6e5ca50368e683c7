"""What attention's kernels on a mesh share: over which axes rows and heads are divided, and whether sizes divide."""

import dataclasses
import math

import jax
from jax.sharding import Mesh


def manual_axes() -> tuple[str, ...]:
    """Axes of a `shard_map` around: of a pipeline's stage, of explicit ZeRO."""
    inside = jax.sharding.get_abstract_mesh()
    return () if inside.empty else tuple(inside.manual_axes)


@dataclasses.dataclass(frozen=True)
class MeshKernel:
    """A kernel that runs on every device's rows and heads, as `Execution.kernel`.

    Attributes:
      mesh: the devices.
      rows: mesh axes that the rows are divided over.
      heads: mesh axis of the heads, None where they are whole.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str | None

    def divides(self, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
        """Whether rows and heads divide by their axes; inside of a `shard_map` rows can be divided already."""
        parts = self.mesh.shape[self.heads] if self.heads else 1
        rows = math.prod(self.mesh.shape[axis] for axis in self.free_rows())
        return q_BTNH.shape[0] % rows == q_BTNH.shape[2] % parts == k_BSKH.shape[2] % parts == 0

    def free_rows(self) -> tuple[str, ...]:
        """Mesh axes of the rows that no `shard_map` around divides."""
        return tuple(axis for axis in self.rows if axis not in manual_axes())
