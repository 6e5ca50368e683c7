"""Shared parameters: stored once with their owner, borrowed by path.

A pytree cannot alias its leaves, so what is shared is stored once and a table `{path: owner path}` says who
borrows it. `expand` runs before `apply`; gradients then add up in the owner:

    ties = parse(["decoder/layers/attention/key=decoder/layers/attention/query"])
    params = tie(params, ties)          # decoder/layers/attention has no key any more
    model.apply({"params": expand(params, ties)}, input_ids)
"""

from collections.abc import Iterable, Mapping

import jax

from llm_jax.nn.protocols import Params, Tree

Ties = Mapping[str, str]


def parse(texts: Iterable[str]) -> Ties:
    """The table written as `path=owner path`, one entry a text.

    Raises:
      ValueError: for another form, a path that borrows twice, or an owner that itself borrows.
    """
    ties: dict[str, str] = {}
    for text in texts:
        path, _, owner = text.partition("=")
        if not path or not owner:
            raise ValueError(f"ties hold {text!r}, which is not of the form path=owner")
        if path in ties:
            raise ValueError(f"{path!r} borrows from both {ties[path]!r} and {owner!r}")
        ties[path] = owner
    _check(ties)
    return ties


def _check(ties: Ties) -> None:
    for path, owner in ties.items():
        if owner in ties:
            raise ValueError(f"{owner!r} borrows from {ties[owner]!r} and cannot own {path!r}")


def _get(tree: Tree, path: str) -> Tree:
    for key in path.split("/"):
        if not isinstance(tree, Mapping) or key not in tree:
            raise ValueError(f"tie names {path!r}, which is not in the parameters")
        tree = tree[key]
    return tree


def _set(tree: Tree, keys: list[str], value: Tree) -> Params:
    here = dict(tree or {})
    here[keys[0]] = value if len(keys) == 1 else _set(here.get(keys[0]), keys[1:], value)
    return here


def _drop(tree: Tree, keys: list[str]) -> Params:
    here = dict(tree)
    if len(keys) == 1:
        del here[keys[0]]
        return here
    here[keys[0]] = _drop(here[keys[0]], keys[1:])
    if not here[keys[0]]:
        del here[keys[0]]
    return here


def expand(params: Params, ties: Ties) -> Params:
    """Puts every borrowed subtree where its borrower expects it (no copy is made under jit).

    Raises:
      ValueError: if an owner is missing, or itself borrows.
    """
    _check(ties)
    for path, owner in ties.items():
        params = _set(params, path.split("/"), _get(params, owner))
    return params


def tie(params: Params, ties: Ties) -> Params:
    """Drops the borrowers' own copies, so that only the owners are stored, trained and saved.

    Raises:
      ValueError: if a path is missing, or borrower and owner differ in names or shapes.
    """
    for path, owner in ties.items():
        if _shapes(_get(params, owner)) != _shapes(_get(params, path)):
            raise ValueError(f"{path!r} cannot borrow {owner!r}: their names, types or shapes differ")
    for path in ties:
        params = _drop(params, path.split("/"))
    return params


def _shapes(tree: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda tree: tree, tree))
    return structure, [(x.shape, x.dtype) for x in leaves]
