"""Disk as the third floor: optimizer state in memory-mapped files, updated piece by piece.

A piece is one layer of a stack, or everything outside of stacks. The next piece is read while one is updated, so the
state in memory is two pieces, whatever the model's depth. A checkpoint copies the files.

Sources: Rajbhandari et al. 2021 (ZeRO-Infinity), https://arxiv.org/abs/2104.07857.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import io_callback

from llm_jax.nn import paths
from llm_jax.nn.protocols import Params, Tree
from llm_jax.parallel.memory.offload import Signals, Update, lies_on_host
from llm_jax.storage.mapped import Ahead, Declared, MappedArrays

PARTS = ("opt_state", "master", "average")  # of a `TrainState`
EMPTY = (1,)  # shape of what stands for an array in a file: checkpoints hold no empty arrays
Index: TypeAlias = int | jax.Array


class Pieces(NamedTuple):
    """What is updated piece by piece: the layers of a stack, or everything outside of stacks as one piece.

    Attributes:
      stack: path of the stack, empty outside of stacks.
      total: how many pieces.
      paths: paths of the parameters.
    """

    stack: str
    total: int
    paths: list[str]

    @classmethod
    def all_of(cls, params: Params) -> "list[Pieces]":
        """The pieces of a tree, one entry for every stack."""
        found: dict[str, Pieces] = {}
        for path, leaf in paths.flatten(params):
            stack = paths.stack_of(path)
            found.setdefault(stack, cls(stack, leaf.shape[0] if stack else 1, [])).paths.append(path)
        return list(found.values())

    def take(self, flat: Mapping[str, Any], number: Index) -> Params:
        """A piece of arrays given by path, as a tree of the same names."""
        return paths.nested((p, self.cut(flat[p], number)) for p in self.paths)

    def cut(self, array: Any, number: Index) -> Any:
        """A piece of one array."""
        return array[number] if self.stack else array[...]

    def shape_of(self, whole: Declared) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a piece of one array."""
        return jax.ShapeDtypeStruct(whole.shape[1:] if self.stack else whole.shape, whole.dtype)

    def put(self, array: jax.Array, number: Index, value: jax.Array) -> jax.Array:
        """Replaces a piece of an array."""
        return array.at[number].set(value) if self.stack else value


def _join(tree: Tree, arrays: Iterable[Any], scalars: Iterable[Any]) -> Tree:
    """A tree like `tree`: its arrays and its scalars in turn from the two."""
    arrays, scalars = iter(arrays), iter(scalars)
    return jax.tree.map(lambda x: next(arrays) if lies_on_host(x) else next(scalars), tree)


def _split(tree: Tree) -> tuple[list[Any], list[Any]]:
    """Undoes `_join`."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if lies_on_host(x)], [x for x in leaves if not lies_on_host(x)]


class OnDisk:
    """The part of a training state that lies in files, and the update that goes through it (`run_update`).

    Attributes:
      arrays: the files, by the paths that a checkpoint has.
    """

    def __init__(self, folder: epath.PathLike, init: Callable[[Params], Tree], shapes: Any) -> None:
        """Makes no file yet.

        Args:
          folder: scratch, local.
          init: makes the optimizer's state; the optimizer's update must be elementwise.
          shapes: the abstract `TrainState`, whole.
        """
        self._init, self._shapes = init, shapes
        leaves = ((f"{part}/{path}", x) for part in PARTS for path, x in paths.flatten(getattr(shapes, part)))
        found = {path: x for path, x in leaves if lies_on_host(x)}
        self.arrays = MappedArrays(folder, {p: Declared(tuple(x.shape), np.dtype(x.dtype)) for p, x in found.items()})
        self._names: dict[str, list[str]] = {}  # files of a piece, by stack

    def without(self, state: Any, parts: Sequence[str] = PARTS) -> Any:
        """The `TrainState` with one zero for every array in files."""
        drop = lambda x: jnp.zeros(EMPTY, x.dtype) if lies_on_host(x) else x
        return state.replace(**{part: jax.tree.map(drop, getattr(state, part)) for part in parts})

    def take(self, state: Any) -> Any:
        """Writes a first `TrainState`'s part to the files, moments as zeros; returns the state without it."""
        for part in PARTS:
            for path, x in paths.flatten(getattr(state, part)):
                if lies_on_host(x):
                    self.arrays.fill(f"{part}/{path}", None if part == "opt_state" else np.asarray(x))
        return self.without(state)

    def _read(self, pieces: Pieces, number: int) -> list[np.ndarray]:
        return [np.array(pieces.cut(self.arrays[name], number)) for name in self._names[pieces.stack]]

    def _write(self, pieces: Pieces, number: Index, values: list[Any]) -> None:
        for name, value in zip(self._names[pieces.stack], values, strict=True):
            self.arrays[name][int(number) if pieces.stack else ...] = np.asarray(value)

    def _like(self, pieces: Pieces, flat_grads: Mapping[str, Any]) -> dict[str, Tree]:
        """Abstract state of a piece, by the parts of `PARTS` that there are; notes its files."""
        piece = jax.eval_shape(lambda: pieces.take(flat_grads, 0))
        parts = {"opt_state": jax.eval_shape(self._init, piece), "master": piece, "average": piece}
        like = {k: v for k, v in parts.items() if k == "opt_state" or getattr(self._shapes, k) is not None}
        self._names[pieces.stack] = [path for path, x in paths.flatten(like) if lies_on_host(x)]
        return like

    def __call__(self, update: Update, resident: Tree, grads: Params, signals: Signals) -> tuple[Tree, Params | None]:
        """As `offload.HostUpdate`: `update(resident, grads, signals)`, where `resident` lacks what lies in files."""
        opt_state, learn, average = resident
        master = self._shapes.master is not None
        every, counters = Pieces.all_of(grads), _split(opt_state)[1]
        of = {p.stack: p for p in every}
        ahead = Ahead(lambda stack, number: self._read(of[stack], number), {p.stack: p.total for p in every})
        flat_grads, flat_learn, params = (dict(paths.flatten(t)) for t in (grads, learn, self._shapes.params))

        def update_all(pieces: Pieces) -> tuple[dict[str, jax.Array], list[Any]]:
            """(parameters of all pieces by path, the optimizer's counters)."""
            like = self._like(pieces, flat_grads)
            shapes = [pieces.shape_of(self.arrays.declared(name)) for name in self._names[pieces.stack]]
            seed = jax.random.fold_in(signals.key, np.uint32(zlib.crc32(pieces.stack.encode())))

            def fetch(number: Any) -> list[np.ndarray]:
                return ahead(pieces.stack, int(number))

            def update_piece(number: jax.Array, carry: tuple[dict[str, jax.Array], list[Any]]) -> Any:
                out, _ = carry
                stored = _join(like, io_callback(fetch, shapes, number, ordered=True), counters)
                learning = stored["master"] if master else pieces.take(flat_learn, number)
                piece = stored["opt_state"], learning, stored.get("average")
                drawn = signals._replace(key=jax.random.fold_in(seed, number))
                new, computing = update(piece, pieces.take(flat_grads, number), drawn)
                parts = dict(zip(PARTS, new, strict=True))
                arrays, scalars = _split({k: parts[k] for k in like})
                io_callback(functools.partial(self._write, pieces), None, number, arrays, ordered=True)
                result = dict(paths.flatten(computing if master else new[1]))
                return {p: pieces.put(out[p], number, x) for p, x in result.items()}, scalars

            fresh = lambda p: jnp.zeros(params[p].shape, params[p].dtype) if master else flat_learn[p]
            return jax.lax.fori_loop(0, pieces.total, update_piece, ({p: fresh(p) for p in pieces.paths}, counters))

        moved: dict[str, jax.Array] = {}
        after = counters
        for pieces in every:
            out, after = update_all(pieces)
            moved |= out
        whole = jax.tree.unflatten(jax.tree.structure(grads), [moved[path] for path, _ in paths.flatten(grads)])
        opt_state = _join(opt_state, _split(opt_state)[0], after)
        return (opt_state, learn if master else whole, average), whole if master else None
