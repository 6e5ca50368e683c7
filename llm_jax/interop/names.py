"""Reading and writing other people's tensors by rules.

A rule says where one of our parameters lives in their file and how to get it: `{l}` stands for the layer. Reading is by
slices, tensor by tensor, the largest first: memory holds the parameters so far and one tensor.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params, Tree

log = logging.getLogger(__name__)


class InteropError(ValueError):
    """A model that cannot be loaded or saved; the message names the tensors."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters in their file.

    Attributes:
      ours: our path, without the layer index.
      theirs: their name, `{l}` for the layer; where they number layers in groups, `{l}` for the group and `{inner}` for
        the layer in it.
      transposed: whether they store `[out, in]`.
      part: (index, sizes) of the piece of their last axis (first where transposed) that is ours: fused projections.
      forward: turns their array, transposed and cut, into ours (rotary layouts).
      backward: the inverse of `forward`, for saving.
      group_size: layers of a group.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, tuple[int, ...]] | None = None
    forward: Callable[[np.ndarray], np.ndarray] | None = None
    backward: Callable[[np.ndarray], np.ndarray] | None = None
    group_size: int = 1

    @property
    def is_stacked(self) -> bool:
        """Whether the file has one tensor per layer."""
        return "{l}" in self.theirs

    def at(self, layer: int | None) -> str:
        """Their name of a layer's tensor; without a layer the name as it is."""
        if layer is None:
            return self.theirs
        return self.theirs.format(l=layer // self.group_size, inner=layer % self.group_size)

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Their names of the tensors of our parameter of this shape: one a layer, or one in all."""
        return [self.at(layer) for layer in range(shape[0])] if self.is_stacked else [self.theirs]


def linear(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """The rules of a linear layer; their kernel is `[out, in]`."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", transposed=True)
    return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else [kernel]


def norm(ours: str, theirs: str) -> list[Rule]:
    """The rules of a norm with scale and bias."""
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def without(prefix: str, rules: Sequence[Rule]) -> list[Rule]:
    """The same rules where their names leave a prefix out."""
    return [dataclasses.replace(r, theirs=r.theirs.removeprefix(prefix)) for r in rules]


def _get(source: Mapping[str, np.ndarray], rule: Rule, layer: int | None) -> np.ndarray:
    name = rule.at(layer)
    array = source[name]
    if rule.transposed:
        array = array.T
    if rule.part is not None:
        index, sizes = rule.part
        if array.shape[-1] != sum(sizes):
            raise InteropError(f"{name} has shape {array.shape}, expected {sum(sizes)} in the split dimension")
        start = sum(sizes[:index])
        array = array[..., start : start + sizes[index]]
    return array if rule.forward is None else rule.forward(array)


def _fill_rows(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Pads a vocabulary axis with zeros; any other difference is an error."""
    if array.shape == shape:
        return array
    differ = [i for i, (a, b) in enumerate(zip(array.shape, shape, strict=False)) if a != b]
    if len(array.shape) != len(shape) or len(differ) != 1 or array.shape[differ[0]] > shape[differ[0]]:
        raise InteropError(f"{name} has shape {list(array.shape)}, the config asks for {list(shape)}")
    widths = [(0, b - a) for a, b in zip(array.shape, shape, strict=True)]
    return np.pad(array, widths)


def read_params(
    source: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    abstract: Params,
    ignored: Callable[[str], bool],
    where: str,
    dtype: DTypeLike | None = None,
    shardings: Tree = None,
    padded: Callable[[str], bool] = lambda path: False,
    fresh: Mapping[str, Any] | None = None,
    left: Callable[[str], bool] = lambda path: False,
) -> Params:
    """Builds our (stacked) parameter tree from their tensors.

    Args:
      source: their tensors, read lazily.
      rules: one for every one of our parameters.
      abstract: our tree of shapes.
      ignored: says which of their tensors we do not need (buffers, tied copies).
      where: names the source in messages.
      dtype: cast floating tensors; theirs by default.
      shardings: tree of shardings; one device by default. Every slice is read once, however many replicas want it.
      padded: says which of our parameters may have padded rows.
      fresh: initial values of parameters that the file may lack; those that it has are read.
      left: says which stacked parameters stay in the file (`read_layer`) and are an empty `[L, 0]` array in the tree.

    Raises:
      InteropError: naming missing, unexpected and misshapen tensors.
    """
    by_path = {r.ours: r for r in rules}
    leaves = paths.flatten(abstract)
    unknown = [path for path, _ in leaves if path not in by_path]
    if unknown:
        raise InteropError(f"{where}: no rule for {unknown[:3]}; this model cannot be read from that format")
    initial = {p: fresh[p] for p, leaf in leaves if fresh and p in fresh and _is_absent(source, by_path[p], leaf)}
    if initial:
        log.info("%s has no %s: initialised", where, some(sorted(initial)))
    wanted = {name for path, leaf in leaves if path not in initial for name in by_path[path].names(leaf.shape)}
    replaced = {by_path[path].theirs for path in initial}
    _check_names(set(source), wanted, lambda name: name in replaced or ignored(name), where)
    flat_shardings = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    out: list[Any] = [None] * len(leaves)
    for i in sorted(range(len(leaves)), key=lambda i: -math.prod(leaves[i][1].shape)):
        path, leaf = leaves[i]
        if left(path):
            _check_layers(source, by_path[path], leaf)
            out[i] = jnp.zeros((leaf.shape[0], 0))
        elif path in initial:
            value = initial[path] if dtype is None else initial[path].astype(jnp.dtype(dtype))
            out[i] = jax.device_put(value, flat_shardings[i])
        else:
            out[i] = _read(source, by_path[path], leaf.shape, dtype, flat_shardings[i], padded(path))
    return jax.tree.unflatten(jax.tree.structure(abstract), out)


def _check_names(names: set[str], wanted: set[str], ignored: Callable[[str], bool], where: str) -> None:
    missing, extra = sorted(wanted - names), sorted(n for n in names - wanted if not ignored(n))
    if missing or extra:
        parts = [f"missing {some(missing)}"] * bool(missing) + [f"unexpected {some(extra)}"] * bool(extra)
        raise InteropError(f"{where} does not fit its config: {'; '.join(parts)}")


def _is_absent(source: Mapping[str, np.ndarray], rule: Rule, leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether a file lacks a parameter of a head; a head for other labels is as good as none."""
    if rule.theirs not in source:
        return True
    return rule.part is None and _get(source, rule, None).shape != tuple(leaf.shape)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy, which needs 64 bytes of alignment."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype).reshape(shape)


def some(names: Sequence[str]) -> str:
    """The first four names and the number of the others, for messages."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _slice(
    source: Mapping[str, np.ndarray], rule: Rule, layer: int | None, shape: tuple[int, ...], padded: bool = False
) -> np.ndarray:
    name = rule.at(layer)
    array = _get(source, rule, layer)
    if padded:
        return _fill_rows(array, shape, name)
    if array.shape != shape:
        raise InteropError(f"{name} has shape {list(array.shape)}, the config asks for {list(shape)}")
    return array


def _check_layers(source: Mapping[str, np.ndarray], rule: Rule, leaf: jax.ShapeDtypeStruct) -> None:
    for layer in range(leaf.shape[0]):
        _slice(source, rule, layer, leaf.shape[1:])


def _cast(stored: DTypeLike, asked: DTypeLike | None) -> np.dtype:
    return jnp.dtype(stored if asked is None or not jnp.issubdtype(stored, jnp.floating) else asked)


def read_layer(
    source: Mapping[str, np.ndarray],
    by_path: Mapping[str, Rule],
    abstract: Params,
    prefix: str,
    index: int,
    dtype: DTypeLike | None = None,
) -> Params:
    """One layer of a stack, as numpy arrays in memory of their own.

    Args:
      source: their tensors.
      by_path: the rule of each of our parameters.
      abstract: shapes of the stack's parameters, `[L, ...]` each.
      prefix: what stands before their paths in our whole tree, such as `decoder/layers/`.
      index: number of the layer.
      dtype: cast floating tensors; theirs by default.
    """

    def read(path: str, leaf: Any) -> np.ndarray:
        array = _slice(source, by_path[prefix + path], index, leaf.shape[1:])
        block = _aligned(array.shape, _cast(array.dtype, dtype))
        block[...] = array
        return block

    return paths.map_with_path(read, abstract)


def _read(
    source: Mapping[str, np.ndarray],
    rule: Rule,
    shape: tuple[int, ...],
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None,
    padded: bool,
) -> jax.Array:
    """One of our parameters, on its devices."""
    of_layer = functools.partial(_slice, source, rule, shape=shape[1:] if rule.is_stacked else shape, padded=padded)
    whole = None if rule.is_stacked else of_layer(None)
    kind = _cast((of_layer(0) if whole is None else whole).dtype, dtype)

    @functools.cache
    def block(*bounds: tuple[int, int]) -> np.ndarray:
        out = _aligned(tuple(stop - start for start, stop in bounds), kind)
        inner = tuple(slice(*pair) for pair in bounds)
        if whole is not None:
            out[...] = whole[inner]
        else:
            for i, layer in enumerate(range(*bounds[0])):
                out[i] = of_layer(layer)[inner[1:]]
        return out

    if sharding is None:
        return jax.device_put(block(*((0, size) for size in shape)))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: block(*(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)))
    )


def _dense(w: np.ndarray | jax.Array | weights.Weight, layer: int | None) -> np.ndarray | jax.Array:
    if isinstance(w, np.ndarray):
        return w if layer is None else w[layer]
    if layer is not None:
        return _dense_layer(w, layer)
    return w if isinstance(w, jax.Array) else weights.materialize(w)


@jax.jit
def _dense_layer(w: jax.Array | weights.Weight, layer: int) -> jax.Array:
    return weights.dense(jax.tree.map(lambda x: x[layer], w))


def write_params(
    params: Params, rules: Sequence[Rule], rows: Mapping[str, int], dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields their (name, array) for our stacked tree; structured weights are written as their dense matrices.

    Args:
      params: stacked parameters.
      rules: one for every parameter.
      rows: our path -> real rows, where rows are padded.
      dtype: cast; ours by default.

    Raises:
      InteropError: if a parameter has no rule.
    """
    values = dict(paths.flatten(params, weights.is_node))
    by_theirs: dict[str, list[Rule]] = {}
    for rule in rules:
        if rule.ours in values:
            by_theirs.setdefault(rule.theirs, []).append(rule)
    homeless = sorted(values.keys() - {r.ours for r in rules})
    if homeless:
        raise InteropError(f"{some(homeless)} have no place in that format; merge or detach what was added first")
    for group in by_theirs.values():
        group = sorted(group, key=lambda r: 0 if r.part is None else r.part[0])
        layers = range(weights.shape_of(values[group[0].ours])[0]) if group[0].is_stacked else [None]
        for layer in layers:
            pieces = [_written(_dense(values[rule.ours], layer), rule, rows.get(rule.ours)) for rule in group]
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
            joined = joined.T if group[0].transposed else joined
            yield group[0].at(layer), joined if dtype is None else joined.astype(jnp.dtype(dtype))


def _written(ours: Any, rule: Rule, rows: int | None) -> np.ndarray:
    """Our array without its padding, as their piece; not yet transposed."""
    array = np.asarray(ours)
    if rows is not None:
        array = array[..., :rows] if rule.transposed else array[:rows]
    return array if rule.backward is None else rule.backward(array)
