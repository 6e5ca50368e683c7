"""Targets of deltas: names that mean the same in every family, and patterns.

A target is

*   `all-linear`: every kernel of attention, cross-attention and feed-forward layers;
*   a name, `attention`, `mlp.up`, `cross_attention.query`, `head`: the kernels of that module;
*   `layers[0:6]`, `layers[3]`, `layers[0,2,5]`: all-linear of these layers; `layers[0:6].attention.query`: one module
    of theirs;
*   any of these after `encoder.` or `decoder.`;
*   a pattern of `nn.paths`: with a slash, a glob or `re:`.

Layers are counted from 0 in their own stack. They are chosen in stacked trees too, where one array holds all layers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from llm_jax.nn import paths, weights

Layers = tuple[int, ...]
ALL_LINEAR = "all-linear"
_NAME = re.compile(r"(?:(encoder|decoder)(?:\.|$))?(?:layers\[([\d:,\s-]*)\](?:\.|$))?(.*)")


def _numbers(text: str, count: int, target: str) -> set[int]:
    """The layers that `0:6`, `3` or `0,2,5` names."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            begin = int(first) if first else 0
            end = (int(last) if last else count) if colon else begin + 1
        except ValueError:
            raise ValueError(f"target {target!r}: {part!r} is not a number or a range of layers") from None
        if not (first or colon) or not 0 <= begin < end <= count:
            raise ValueError(f"target {target!r}: there are layers 0 to {count - 1}, not {part.strip() or 'nothing'!r}")
        chosen |= set(range(begin, end))
    return chosen


def _is_pattern(target: str) -> bool:
    return target.startswith("re:") or any(c in re.sub(r"layers\[[^]]*\]", "", target) for c in "/*?[")


def _matcher(name: str) -> paths.Predicate:
    """Matches the paths that a dotted name without layers stands for."""
    if name in ("", ALL_LINEAR):
        return paths.matcher(weights.LAYER_KERNELS)
    path = name.replace(".", "/")
    return paths.matcher((f"{path}/kernel", f"{path}/*/kernel", f"{path}/embedding", path))


def layer_counts(params: Any) -> dict[str, int]:
    """Number of layers of every stack of a tree, by the stack's path."""
    counts: dict[str, int] = {}
    for path, w in paths.flatten(params, weights.is_node):
        if place := paths.layer_of(path):
            stack, number = place
            size = jax.tree.leaves(w)[0].shape[0] if number is None else number + 1  # of any node, ports' too
            counts[stack] = max(counts.get(stack, 0), size)
    return counts


def resolve(params: Any, targets: str | Iterable[str]) -> dict[str, Layers | None]:
    """The weights that targets name.

    Args:
      params: a parameter tree, stacked or not; abstract will do. Structured weights count as one.
      targets: see the module.

    Returns:
      Path of each weight -> the layers that are chosen of a stacked weight, ascending; None for all of it.

    Raises:
      ValueError: if a target matches nothing, or names layers that there are not.
    """
    flat = paths.flatten(params, weights.is_node)
    counts = layer_counts(params)
    chosen: dict[str, set[int] | None] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        found = _find(flat, counts, target)
        if not found:
            names = sorted({p.rpartition("/")[0].rpartition("/")[2] for p, _ in flat if p.endswith("kernel")})
            raise ValueError(
                f"target {target!r} matches no parameter; modules are called {', '.join(names[:12])}, paths look like "
                f"{[p for p, _ in flat[:3]]}"
            )
        for path, layers in found.items():
            before = chosen.get(path, set())
            chosen[path] = None if layers is None or before is None else before | layers
    order = [p for p, _ in flat if p in chosen]
    return {path: _settled(path, chosen[path], counts) for path in order}


def _settled(path: str, layers: set[int] | None, counts: Mapping[str, int]) -> Layers | None:
    place = paths.layer_of(path)
    if layers is None or place is None or len(layers) == counts[place[0]]:
        return None
    return tuple(sorted(layers))


def _find(flat: Sequence[tuple[str, Any]], counts: Mapping[str, int], target: str) -> dict[str, set[int] | None]:
    if _is_pattern(target):
        match = paths.matcher(target)
        return {path: None for path, _ in flat if match(path)}
    parts = _NAME.fullmatch(target)
    assert parts is not None  # the last group takes anything
    stack, numbers, name = parts.groups()
    match = _matcher(name)
    found: dict[str, set[int] | None] = {}
    for path, _ in flat:
        if not match(path) or (stack and path.split("/")[0] != stack):
            continue
        place = paths.layer_of(path)
        if numbers is None:
            found[path] = None
        elif place is not None:
            wanted = _numbers(numbers, counts[place[0]], target)
            if place[1] is None:
                found[path] = wanted
            elif place[1] in wanted:
                found[path] = None
    return found


def numbers_of(params: Any, texts: Iterable[str]) -> dict[str, dict[int | None, float]]:
    """Reads `target=number` texts: path -> {layer, or None for a weight without a stacked axis: number}.

    Later texts win where several name a layer.

    Raises:
      ValueError: for another form, or as `resolve`.
    """
    counts = layer_counts(params)
    out: dict[str, dict[int | None, float]] = {}
    for text in texts:
        target, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"{text!r} is not of the form target=number") from None
        if not equals or not target:
            raise ValueError(f"{text!r} is not of the form target=number")
        for path, layers in resolve(params, target).items():
            place = paths.layer_of(path)
            stacked = place is not None and place[1] is None
            every: Iterable[int | None] = range(counts[place[0]]) if stacked and place else (None,)
            out.setdefault(path, {}).update(dict.fromkeys(layers if layers is not None else every, value))
    return out
