"""DoRA: a LoRA whose merged columns have lengths of their own, which train as well.

A column of the matrix becomes `m * (W + s A B) / ||W + s A B||`. As in the authors' code no gradient passes through the
norm. The matrix W + s A B is never built: with the squares of W's columns stored once,

    ||W + s A B||^2 = ||W||^2 + 2 s (A^T W) . B + s^2 (A^T A B) . B       per column

costs r products of a vector and W, which is little beside the product of a batch.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from llm_jax.delta.lora import Lora
from llm_jax.delta.node import Bias, Delta, DeltaError, is_delta
from llm_jax.nn import paths, weights
from llm_jax.nn.execution import PRODUCT
from llm_jax.nn.protocols import Params
from llm_jax.nn.weights import Axes

TRAINABLE = ("*/a", "*/b", "*/magnitude")


class Dora(Delta):
    """`base * magnitude / ||base||`, column by column, around a `Lora`.

    Attributes:
      base: a `Lora`.
      magnitude: m, `[out]` (with a leading layer axis when stacked); the norms of the first matrix at first.
      squares: float32 `[out]`, squared norms of the columns below the LoRA; does not train.
    """

    base: Any
    magnitude: jax.Array
    squares: jax.Array

    trains: ClassVar[tuple[str, ...]] = ("magnitude",)
    name: ClassVar[str] = "DoRA"

    def factor(self) -> jax.Array:
        """`magnitude / ||W + s A B||`, float32 `[out]`; no gradient passes through the norm."""
        return weights.wide(self.magnitude) / self.norm()

    def norm(self) -> jax.Array:
        """`||W + s A B||`, float32 `[out]`, of one layer."""
        lora = self.base
        a, b, squares = jax.lax.stop_gradient((weights.wide(lora.a), weights.wide(lora.b), self.squares))
        cross_RO = jax.lax.stop_gradient(weights.wide(weights.matmul(a.T.astype(lora.a.dtype), lora.base)))
        mixed = lora.scaled(jnp.sum(cross_RO * b, axis=0))
        own = lora.scaled(lora.scaled(jnp.sum((a.T @ a @ b) * b, axis=0)))
        return jnp.sqrt(jnp.maximum(squares + 2 * mixed + own, 1e-30))

    def ready(self) -> "ReadyDora":
        """This DoRA with its norms computed; where a matrix is divided over devices, that exchanges sums."""
        norm = type(self).norm
        for _ in self.shape[:-2]:
            norm = jax.vmap(norm)
        return ReadyDora(weights.ready(self.base), self.magnitude, self.squares, norms=norm(self))

    def fold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Gives the columns of the merged LoRA the lengths `magnitude`."""
        norm = jnp.linalg.norm(weights.wide(matrix), axis=-2)
        return weights.scaled(matrix, (weights.wide(self.magnitude) / norm)[..., None, :]), bias

    def unfold(self, matrix: jax.Array, bias: Bias) -> tuple[jax.Array, Bias]:
        """Refused: the lengths of the columns before are not stored."""
        raise DeltaError("DoRA cannot be taken out of a merged matrix; keep the parameters before the merge")

    def matmul(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`(x @ (W + s A B)) * factor`."""
        product = checkpoint_name(weights.matmul(x, self.base, key), PRODUCT)  # the magnitude's gradient reads it
        return weights.scaled(product, self.factor())

    def matmul_t(self, x: jax.Array) -> jax.Array:
        """`(x * factor) @ (W + s A B).T`."""
        return weights.matmul_t(weights.scaled(x, self.factor()), self.base)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows of the merged matrix."""
        return weights.scaled(weights.take(self.base, ids), self.factor())

    def axes(self, base: Axes) -> "Dora":
        """Both vectors take the output axis."""
        *lead, _, o = base
        vectors: Dora = jax.tree.map(lambda _: Axes(*lead, o), self.replace(base=None))
        return vectors.replace(base=weights.axes_of(self.base, base))

    def cast(self, dtype: DTypeLike) -> "Dora":
        """Casts the LoRA; lengths of columns stay as they are."""
        return self.replace(base=weights.cast(self.base, dtype))


class ReadyDora(Dora, kw_only=True):
    """A DoRA whose norms were computed in advance, for one step; never stored.

    Attributes:
      norms: float32 `[out]` (with a leading layer axis when stacked), of the columns with the LoRA.
    """

    norms: jax.Array

    def norm(self) -> jax.Array:
        """The norms that were computed in advance."""
        return jax.lax.stop_gradient(self.norms)


@jax.jit
def squares_of(w: Any) -> jax.Array:
    """Squared norms of the columns of a weight, float32 `[..., out]`."""
    return jnp.sum(jnp.square(weights.wide(weights.dense(w))), axis=-2)


def around(w: Lora) -> Dora:
    """A DoRA that changes nothing yet, around a LoRA.

    Raises:
      DeltaError: if the base below the LoRA is a delta itself, whose columns would change while it trains.
    """
    if is_delta(w.base):
        raise DeltaError(f"DoRA needs a plain or quantized matrix below its LoRA, not {w.base.name}")
    return Dora(w, jnp.sqrt(squares_of(w)), squares_of(w.base))


def attach(params: Params) -> Params:
    """Turns every LoRA of a tree into DoRA."""
    wrap = lambda path, w: around(w) if isinstance(w, Lora) else w
    return paths.map_with_path(wrap, params, is_leaf=weights.is_node)
