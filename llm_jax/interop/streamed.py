"""Models larger than memory: layers stay in their file, and the next one is read while the current one computes.

A stack's runner scans over layer numbers and has every layer's parameters fetched by a callback, so a streamed model
runs under `jit`, in a decoding loop and in a beam search as any other. Two or three layers are in memory at once,
beside embeddings and head.

Sources: Rajbhandari et al. 2021 (ZeRO-Infinity, inference and training from slower memories),
https://arxiv.org/abs/2104.07857.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llm_jax.interop import names
from llm_jax.nn import paths
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Params, Tree
from llm_jax.nn.stack import Call, scanned
from llm_jax.storage.mapped import Ahead


class Streamed:
    """A stack runner (`Execution.stack_runner`) whose layers are read when they run; for inference."""

    def __init__(
        self, read: Callable[[tuple[str, ...], int], Params], shapes: Mapping[tuple[str, ...], Params]
    ) -> None:
        """Reads nothing yet.

        Args:
          read: `(path of a stack, number of a parameter set) -> numpy arrays`.
          shapes: by a stack's path, `[L, ...]` shapes with the dtypes that are read.
        """
        self._layer = {path: jax.tree.map(_without_layers, tree) for path, tree in shapes.items()}
        self._ahead = Ahead(read, {path: jax.tree.leaves(tree)[0].shape[0] for path, tree in shapes.items()})

    def __call__(self, call: Call) -> tuple[Tree, Tree]:
        """Runs the layers of a stack."""
        fetch = functools.partial(self._fetch, call.path)

        def layer(number: jax.Array, index: jax.Array, carry: Tree, inputs: Tree) -> tuple[Tree, Tree, Tree]:
            params = jax.pure_callback(fetch, self._layer[call.path], number)
            return call.layer(params, index, carry, inputs, call.context)

        numbers = jnp.arange(max(call.group_of) + 1)  # instead of stacked parameters
        return scanned(layer, numbers, None, call.group_of, call.carry, call.per_layer, Execution())[:2]

    def _fetch(self, path: tuple[str, ...], number: np.ndarray) -> Params:
        return self._ahead(path, int(number))


def _without_layers(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def runner(
    source: Mapping[str, np.ndarray],
    rules: Sequence[names.Rule],
    shapes: Params,
    where: str,
    dtype: DTypeLike | None = None,
) -> Streamed:
    """A runner that reads its layers from a file.

    Args:
      source: their tensors, read lazily.
      rules: where each of our parameters is.
      shapes: our whole tree of shapes.
      where: names the source in messages.
      dtype: cast floating tensors; theirs by default.

    Raises:
      InteropError: if the model has no stacks of equal layers.
    """
    stacks: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    for path, leaf in paths.flatten(shapes):
        if stack := paths.stack_of(path):
            rest = path.removeprefix(f"{stack}/layers/")
            stacks.setdefault(tuple(stack.split("/")), []).append((rest, leaf))
    if not stacks:
        raise names.InteropError(f"{where}: this model has no stack of layers to stream")
    trees = {path: paths.nested(leaves) for path, leaves in stacks.items()}
    by_path = {r.ours: r for r in rules}

    def narrow(x: np.ndarray) -> np.ndarray:
        return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)  # float64 where jax has none

    def read(path: tuple[str, ...], number: int) -> Params:
        prefix = "/".join((*path, "layers", ""))
        return jax.tree.map(narrow, names.read_layer(source, by_path, trees[path], prefix, number, dtype))

    def typed(leaf: jax.ShapeDtypeStruct, first: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, first.dtype)

    # the first layer says which dtypes the file has
    return Streamed(read, {path: jax.tree.map(typed, trees[path], read(path, 0)) for path in trees})
