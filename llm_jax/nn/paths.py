"""Parameter paths and the patterns that choose them.

A path is the keys of a leaf joined by slashes, `decoder/layers/attention/query/kernel`. A pattern is one of

*   a suffix at a component boundary: `query/kernel`;
*   a glob (any of `*?[`), matched against the path or a suffix of it: `attention/*/kernel`;
*   a regular expression behind `re:`, matched against the whole path: `re:.*layers/(0|1)/.*`.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

Predicate = Callable[[str], bool]


def path_string(key_path: Sequence[Any]) -> str:
    """Joins a jax key path into `a/b/c`."""
    parts = []
    for key in key_path:
        if isinstance(key, jax.tree_util.DictKey):
            parts.append(str(key.key))
        elif isinstance(key, jax.tree_util.SequenceKey):
            parts.append(str(key.idx))
        elif isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(key.name)
        else:
            parts.append(str(key.key) if hasattr(key, "key") else str(key))
    return "/".join(parts)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Lists `(path, leaf)` in tree order."""
    return [(path_string(k), v) for k, v in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]]


def nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Undoes `flatten` where every key was a dict's: dicts in dicts from `(path, leaf)`."""
    out: dict[str, Any] = {}
    for path, leaf in items:
        *folders, name = path.split("/")
        tree = out
        for key in folders:
            tree = tree.setdefault(key, {})
        tree[name] = leaf
    return out


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`jax.tree.map` whose function takes the path string first."""
    return jax.tree_util.tree_map_with_path(lambda k, *v: fn(path_string(k), *v), tree, *rest, is_leaf=is_leaf)


def is_stacked(path: str) -> bool:
    """Whether a parameter's leading axis counts layers: below `layers`, and not below `layers/3`."""
    parts = path.split("/")
    return "layers" in parts and not parts[parts.index("layers") + 1].isdigit()


def stack_of(path: str) -> str:
    """The path of the stack that a stacked parameter is in; empty for others."""
    return path.partition("/layers/")[0] if is_stacked(path) else ""


def layer_of(path: str) -> tuple[str, int | None] | None:
    """(path of the stack, the layer's number or None in a stacked tree) of a layer's parameter; None for others."""
    for kind in ("/layers/", "/per_layer/"):
        stack, found, rest = f"/{path}".partition(kind)
        if found:
            number = rest.split("/")[0]
            return stack.lstrip("/"), int(number) if number.isdigit() else None
    return None


def _one(pattern: str) -> Predicate:
    if pattern.startswith("re:"):
        regex = re.compile(pattern[3:])
        return lambda path: regex.fullmatch(path) is not None
    if any(c in pattern for c in "*?["):
        return lambda path: fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, "*/" + pattern)
    return lambda path: path == pattern or path.endswith("/" + pattern)


def matcher(patterns: str | Iterable[str]) -> Predicate:
    """Returns a predicate that is true where any of the patterns matches."""
    chosen = [_one(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    return lambda path: any(p(path) for p in chosen)


def select(paths: Iterable[str], patterns: str | Iterable[str]) -> list[str]:
    """The paths that match.

    Raises:
      ValueError: if one of the patterns matches none of the paths; the message shows some paths.
    """
    paths = list(paths)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(map(_one(pattern), paths)):
            raise ValueError(f"pattern {pattern!r} matches no parameter; paths look like {paths[:5]}")
    match = matcher(patterns)
    return [p for p in paths if match(p)]
