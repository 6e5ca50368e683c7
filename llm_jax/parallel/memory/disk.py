"""Disk as the third floor: optimizer state in memory-mapped files, updated piece by piece.

A piece is one layer of a stack, or everything outside of stacks. The next piece is read while one is updated, so the
state in memory is two pieces, whatever the model's depth. A checkpoint copies the files.

Sources: Rajbhandari et al. 2021 (ZeRO-Infinity), https://arxiv.org/abs/2104.07857.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import io_callback

from llm_jax.nn import paths
from llm_jax.parallel.memory.offload import Update, lies_on_host
from llm_jax.storage.mapped import Ahead, Declared, MappedArrays

PARTS = ("opt_state", "master", "average")  # of a `TrainState`
EMPTY = (1,)  # shape of what stands for an array in a file: checkpoints hold no empty arrays


class Pieces(NamedTuple):
    """What is updated piece by piece: the layers of a stack, or everything outside of stacks as one piece.

    Attributes:
      stack: path of the stack, empty outside of stacks.
      total: how many pieces.
      paths: of the parameters.
    """

    stack: str
    total: int
    paths: list[str]

    @classmethod
    def all_of(cls, params: Any) -> "list[Pieces]":
        """Those of a tree."""
        found: dict[str, Pieces] = {}
        for path, leaf in paths.flatten(params):
            stack = paths.stack_of(path)
            found.setdefault(stack, cls(stack, leaf.shape[0] if stack else 1, [])).paths.append(path)
        return list(found.values())

    def take(self, flat: Any, number: Any) -> Any:
        """A piece of arrays given by path, under their own names."""
        return paths.nested((p, self.cut(flat[p], number)) for p in self.paths)

    def cut(self, array: Any, number: Any) -> Any:
        """A piece of one array."""
        return array[number] if self.stack else array[...]

    def shape_of(self, whole: Declared) -> jax.ShapeDtypeStruct:
        """Of a piece of one array."""
        return jax.ShapeDtypeStruct(whole.shape[1:] if self.stack else whole.shape, whole.dtype)

    def put(self, array: Any, number: Any, value: Any) -> Any:
        """An array with another piece."""
        return array.at[number].set(value) if self.stack else value


def _join(tree: Any, arrays: Iterable[Any], scalars: Iterable[Any]) -> Any:
    """A tree like `tree`: its arrays and its scalars in turn from the two."""
    arrays, scalars = iter(arrays), iter(scalars)
    return jax.tree.map(lambda x: next(arrays) if lies_on_host(x) else next(scalars), tree)


def _split(tree: Any) -> tuple[list[Any], list[Any]]:
    """Undoes `_join`."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if lies_on_host(x)], [x for x in leaves if not lies_on_host(x)]


class OnDisk:
    """The part of a training state that lies in files, and the update that goes through it (`run_update`).

    Attributes:
      arrays: the files, by the paths that a checkpoint has.
    """

    def __init__(self, folder: epath.PathLike, init: Callable[[Any], Any], shapes: Any) -> None:
        """Makes no file yet.

        Args:
          folder: scratch, local.
          init: of the optimizer, whose update must be elementwise.
          shapes: the abstract state, whole.
        """
        self._init, self._shapes = init, shapes
        leaves = ((f"{part}/{path}", x) for part in PARTS for path, x in paths.flatten(getattr(shapes, part)))
        found = {path: x for path, x in leaves if lies_on_host(x)}
        self.arrays = MappedArrays(folder, {p: Declared(tuple(x.shape), np.dtype(x.dtype)) for p, x in found.items()})
        self._names: dict[str, list[str]] = {}  # files of a piece, by stack

    def without(self, state: Any, parts: Sequence[str] = PARTS) -> Any:
        """The state with one zero for every array in files."""
        drop = lambda x: jnp.zeros(EMPTY, x.dtype) if lies_on_host(x) else x
        return state.replace(**{part: jax.tree.map(drop, getattr(state, part)) for part in parts})

    def take(self, state: Any) -> Any:
        """Writes a first state's part to the files, moments as zeros; the state without it."""
        for part in PARTS:
            for path, x in paths.flatten(getattr(state, part)):
                if lies_on_host(x):
                    self.arrays.fill(f"{part}/{path}", None if part == "opt_state" else np.asarray(x))
        return self.without(state)

    def _read(self, pieces: Pieces, number: int) -> list[np.ndarray]:
        return [np.array(pieces.cut(self.arrays[name], number)) for name in self._names[pieces.stack]]

    def _write(self, pieces: Pieces, number: Any, values: list[Any]) -> None:
        for name, value in zip(self._names[pieces.stack], values, strict=True):
            self.arrays[name][int(number) if pieces.stack else ...] = np.asarray(value)

    def __call__(self, update: Update, kept: Any, grads: Any, signals: Any) -> Any:
        """As `offload.HostUpdate`: `update(kept, grads, signals)`, where `kept` holds only what is resident."""
        opt_state, learn, average = kept
        master = self._shapes.master is not None
        every, scalars = Pieces.all_of(grads), _split(opt_state)[1]
        of = {p.stack: p for p in every}
        ahead = Ahead(lambda stack, number: self._read(of[stack], number), {p.stack: p.total for p in every})
        flat_grads, flat_learn, params = (dict(paths.flatten(t)) for t in (grads, learn, self._shapes.params))
        moved: dict[str, Any] = {}
        after = scalars
        for pieces in every:
            own = jax.eval_shape(lambda pieces=pieces: pieces.take(flat_grads, 0))
            like = {"opt_state": jax.eval_shape(self._init, own), "master": own, "average": own}
            like = {k: v for k, v in like.items() if k == "opt_state" or getattr(self._shapes, k) is not None}
            names = [path for path, x in paths.flatten(like) if lies_on_host(x)]
            self._names[pieces.stack] = names
            shapes = [pieces.shape_of(self.arrays.declared(name)) for name in names]
            fetch = lambda number, pieces=pieces: ahead(pieces.stack, int(number))
            write = functools.partial(self._write, pieces)
            seed = jax.random.fold_in(signals.key, np.uint32(zlib.crc32(pieces.stack.encode())))

            def one(number, carry, pieces=pieces, like=like, shapes=shapes, fetch=fetch, write=write, seed=seed):
                out, _ = carry
                found = _join(like, io_callback(fetch, shapes, number, ordered=True), scalars)
                here = found["opt_state"], found.get("master", None), found.get("average", None)
                here = here if master else (here[0], pieces.take(flat_learn, number), here[2])
                marked = signals._replace(key=jax.random.fold_in(seed, number))
                new, computing = update(here, pieces.take(flat_grads, number), marked)
                back = dict(zip(PARTS, new, strict=True))
                arrays, counters = _split({k: back[k] for k in like})
                io_callback(write, None, number, arrays, ordered=True)
                result = dict(paths.flatten(computing if master else new[1]))
                return {p: pieces.put(out[p], number, x) for p, x in result.items()}, counters

            fresh = lambda p: jnp.zeros(params[p].shape, params[p].dtype) if master else flat_learn[p]
            out, after = jax.lax.fori_loop(0, pieces.total, one, ({p: fresh(p) for p in pieces.paths}, scalars))
            moved |= out
        whole = jax.tree.unflatten(jax.tree.structure(grads), [moved[path] for path, _ in paths.flatten(grads)])
        opt_state = _join(opt_state, _split(opt_state)[0], after)
        return (opt_state, learn if master else whole, average), whole if master else None
