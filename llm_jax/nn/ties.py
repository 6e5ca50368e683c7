"""Shared parameters: stored once with their owner, borrowed by path.

A pytree cannot alias its leaves, so what is shared is stored once and a table `{path: owner path}` says who
borrows it. `expand` runs before `apply`; gradients then add up in the owner.
"""

from collections.abc import Mapping
from typing import Any

Ties = Mapping[str, str]


def _get(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            raise ValueError(f"tie names {path!r}, which is not in the parameters")
        tree = tree[key]
    return tree


def _set(tree: Any, keys: list[str], value: Any) -> Any:
    here = dict(tree or {})
    here[keys[0]] = value if len(keys) == 1 else _set(here.get(keys[0]), keys[1:], value)
    return here


def _drop(tree: Any, keys: list[str]) -> Any:
    here = dict(tree)
    if len(keys) == 1:
        del here[keys[0]]
        return here
    here[keys[0]] = _drop(here[keys[0]], keys[1:])
    if not here[keys[0]]:
        del here[keys[0]]
    return here


def expand(params: Any, ties: Ties) -> Any:
    """Puts every borrowed subtree where its borrower expects it (no copy is made under jit).

    Raises:
      ValueError: if an owner is missing, or itself borrows.
    """
    for path, owner in ties.items():
        if owner in ties:
            raise ValueError(f"{owner!r} borrows from {ties[owner]!r} and cannot own {path!r}")
        params = _set(params, path.split("/"), _get(params, owner))
    return params


def tie(params: Any, ties: Ties) -> Any:
    """Drops the borrowers' own copies, so that only the owners are stored, trained and saved."""
    for path, owner in ties.items():
        _get(params, owner)
        _get(params, path)
        params = _drop(params, path.split("/"))
    return params
