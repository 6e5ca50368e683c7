"""Reading and writing other people's tensors by rules.

A rule says where one of our parameters lives in their file and how to get it: `{l}` stands for the layer. Reading
is by slices, tensor by tensor, the largest first: never is more in memory than the parameters so far and one tensor.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import paths, weights

log = logging.getLogger(__name__)

# their names of activations, to ours
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class InteropError(ValueError):
    """A model that cannot be loaded or saved; the message names the tensors."""


def banned(config: dict[str, Any]) -> tuple[int, ...]:
    """The entries that `bad_words_ids` keeps from being generated.

    Raises:
      InteropError: on sequences of several.
    """
    words = config.get("bad_words_ids") or []
    if any(len(word) != 1 for word in words):
        raise InteropError(f"bad_words_ids={words!r} has sequences of several tokens, which are not supported")
    return tuple(word[0] for word in words)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters in their file.

    Attributes:
      ours: our path, without the layer index.
      theirs: their name, `{l}` for the layer; where they number layers in groups `{l}` for the group and `{inner}` for
        the layer in it.
      transposed: stored `[out, in]`.
      part: (index, sizes) of the piece of their last axis (first where transposed) that is ours: fused projections.
      forward: their array to ours, after the above (rotary layouts).
      backward: the inverse, for saving.
      group_size: layers of a group.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, tuple[int, ...]] | None = None
    forward: Callable[[np.ndarray], np.ndarray] | None = None
    backward: Callable[[np.ndarray], np.ndarray] | None = None
    group_size: int = 1

    def at(self, layer: int | None) -> str:
        """Their name of a layer's tensor; without a layer the name as it is."""
        if layer is None:
            return self.theirs
        return self.theirs.format(l=layer // self.group_size, inner=layer % self.group_size)


def linear(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """The rules of a linear layer; their kernel is `[out, in]`."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", transposed=True)
    return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else [kernel]


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
    abstract: Any,
    ignored: Callable[[str], bool],
    where: str,
    dtype: Any = None,
    shardings: Any = None,
    padded: Callable[[str], bool] = lambda path: False,
    fresh: Mapping[str, Any] | None = None,
    left: Callable[[str], bool] = lambda path: False,
) -> Any:
    """Builds our (stacked) parameter tree from their tensors.

    Args:
      source: their tensors, read lazily.
      rules: one for every one of our parameters.
      abstract: our tree of shapes.
      ignored: their names that we do not need (buffers, tied copies).
      where: for messages.
      dtype: cast floating tensors; theirs by default.
      shardings: tree of shardings; one device by default. Every slice is read once, however many replicas want it.
      padded: our paths whose rows may be padded.
      fresh: initial values of parameters that the file may lack; those that it has are read.
      left: our stacked paths that stay in the file (`read_layer`): an empty `[L, 0]` array stands in their place.

    Raises:
      InteropError: naming missing, unexpected and misshapen tensors.
    """
    by_path = {r.ours: r for r in rules}
    leaves = paths.flatten(abstract)
    unknown = [p for p, _ in leaves if p not in by_path]
    if unknown:
        raise InteropError(f"{where}: no rule for {unknown[:3]}; this model cannot be read from that format")
    wanted: set[str] = set()
    given: dict[str, Any] = {}
    for path, leaf in leaves:
        theirs = by_path[path].theirs
        if fresh is not None and path in fresh and (theirs not in source or _other_shape(source, by_path[path], leaf)):
            given[path] = fresh[path]
            continue
        wanted |= {by_path[path].at(i) for i in range(leaf.shape[0])} if "{l}" in theirs else {theirs}
    if given:
        log.info("%s has no %s: initialised", where, some(sorted(given)))
    missing = sorted(wanted - set(source))
    replaced = {by_path[path].theirs for path in given}
    extra = sorted(n for n in set(source) - wanted - replaced if not ignored(n))
    if missing or extra:
        parts = [f"missing {some(missing)}"] * bool(missing) + [f"unexpected {some(extra)}"] * bool(extra)
        raise InteropError(f"{where} does not fit its config: {'; '.join(parts)}")
    flat_shardings = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    out: list[Any] = [None] * len(leaves)
    for i in sorted(range(len(leaves)), key=lambda i: -math.prod(leaves[i][1].shape)):
        path, leaf = leaves[i]
        if left(path):
            _check_layers(source, by_path[path], leaf)
            out[i] = jnp.zeros((leaf.shape[0], 0))
            continue
        if path in given:
            value = given[path] if dtype is None else given[path].astype(jnp.dtype(dtype))
            out[i] = jax.device_put(value, flat_shardings[i])
            continue
        out[i] = _read_one(source, by_path[path], path, leaf, dtype, flat_shardings[i], padded(path))
    return jax.tree.unflatten(jax.tree.structure(abstract), out)


def _other_shape(source: Mapping[str, np.ndarray], rule: Rule, leaf: Any) -> bool:
    """A head for other labels is as good as none."""
    return rule.part is None and _get(source, rule, None).shape != tuple(leaf.shape)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy, which needs 64 bytes of alignment."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype).reshape(shape)


def some(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _slice(source, rule, index, shape, padded=False):
    name = rule.at(index)
    array = _get(source, rule, index)
    if padded:
        return _fill_rows(array, shape, name)
    if array.shape != shape:
        raise InteropError(f"{name} has shape {list(array.shape)}, the config asks for {list(shape)}")
    return array


def _check_layers(source, rule, leaf):
    for index in range(leaf.shape[0]):
        _slice(source, rule, index, leaf.shape[1:])


def _cast(kind: Any, dtype: Any) -> Any:
    return kind if dtype is None or not jnp.issubdtype(kind, jnp.floating) else jnp.dtype(dtype)


def read_layer(
    source: Mapping[str, np.ndarray],
    by_path: Mapping[str, Rule],
    abstract: Any,
    prefix: str,
    index: int,
    dtype: Any = None,
) -> Any:
    """One layer of a stack, as numpy arrays in memory of their own.

    Args:
      source: their tensors.
      by_path: the rule of each of our parameters.
      abstract: shapes of the stack's parameters, `[L, ...]` each.
      prefix: what comes before their paths, as `decoder/layers/`.
      index: which layer.
      dtype: cast floating tensors; theirs by default.
    """

    def read(path: str, leaf: Any) -> np.ndarray:
        array = _slice(source, by_path[prefix + path], index, leaf.shape[1:])
        block = _aligned(array.shape, _cast(array.dtype, dtype))
        block[...] = array
        return block

    return paths.map_with_path(read, abstract)


def _read_one(source, rule, path, leaf, dtype, sharding, padded):
    layered = "{l}" in rule.theirs
    shape = leaf.shape[1:] if layered else leaf.shape
    layer = lambda index: _slice(source, rule, index, shape, padded)
    first = layer(0 if layered else None)
    kind = _cast(first.dtype, dtype)
    first = None if layered else first  # of a stacked one only the dtype was wanted
    memo: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in memo:
            sizes = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
            block = memo[key] = _aligned(tuple(sizes), kind)
            if layered:
                for i, l in enumerate(range(*index[0].indices(leaf.shape[0]))):
                    block[i] = layer(l)[index[1:]]
            else:
                block[...] = first[index]
        return memo[key]

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _dense(w: Any, layer: int | None) -> Any:
    if isinstance(w, np.ndarray):
        return w if layer is None else w[layer]
    if layer is None:
        return weights.materialize(w) if weights.is_node(w) else w
    return _dense_layer(w, layer)


_dense_layer = jax.jit(lambda w, layer: weights.dense(jax.tree.map(lambda x: x[layer], w)))


def write_params(
    params: Any, rules: Sequence[Rule], rows: Mapping[str, int], dtype: Any = None
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
    for theirs, group in by_theirs.items():
        group = sorted(group, key=lambda r: 0 if r.part is None else r.part[0])
        count = jax.tree.leaves(values[group[0].ours])[0].shape[0] if "{l}" in theirs else None
        for layer in [None] if count is None else range(count):
            pieces = []
            for rule in group:
                array = np.asarray(_dense(values[rule.ours], layer))
                if rule.ours in rows:
                    array = array[..., : rows[rule.ours]] if rule.transposed else array[: rows[rule.ours]]
                array = array if rule.backward is None else rule.backward(array)
                pieces.append(array)
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
            joined = joined.T if group[0].transposed else joined
            yield group[0].at(layer), joined if dtype is None else joined.astype(jnp.dtype(dtype))
