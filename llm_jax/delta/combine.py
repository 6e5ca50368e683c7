"""Several LoRAs of one base become one.

`concatenated` is exact: the new A holds the columns of all As side by side, the new B their rows, so the update is the
sum of the updates and the rank the sum of the ranks. `weighted` gives the nearest update of a smaller rank, by the
singular values of the sum. Adding As to As and Bs to Bs (peft's "linear") is not offered: the products of one
adapter's A with another's B come in as well.

Sources: the behaviour of peft's `add_weighted_adapter` with `combination_type` "cat" and "svd"; Eckart and Young 1936.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.delta import lora, node
from llm_jax.delta.lora import LayeredLora, Lora
from llm_jax.delta.node import DeltaError
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params

Loras = dict[str, Lora]  # by path


def loras_of(params: Params, name: str) -> Loras:
    """The LoRAs of a tree by path.

    Args:
      params: the tree.
      name: what messages call it.

    Raises:
      DeltaError: if there is none, or a weight carries anything else or more.
    """
    found = node.of(params)
    if not found:
        raise DeltaError(f"{name} has no LoRA")
    for path, w in found.items():
        other = next((d for d in node.layers_of(w)[::-1] if not isinstance(d, Lora)), None)
        if other is not None or not isinstance(w, Lora):
            raise DeltaError(f"{name} carries {(other or w).name} at {path}: only plain LoRAs go together")
        if node.is_delta(w.base):
            raise DeltaError(f"{name} carries several LoRAs at {path}: concatenate or merge them first")
    return {path: w for path, w in found.items() if isinstance(w, Lora)}


def _is_port(w: Any) -> bool:
    return weights.is_node(w) and not isinstance(w, weights.Weight)


def _arrays(w: Any) -> list[jax.Array]:
    """The matrix of a weight, however it is stored; the arrays of a node in a port."""
    return jax.tree.leaves(w) if _is_port(w) else [weights.dense(w)]


def _shapes(w: Any) -> Any:
    return [x.shape for x in jax.tree.leaves(w)] if _is_port(w) else weights.shape_of(w)


@jax.jit
def _equal(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, jax.Array]:
    same = lambda a, b: [jnp.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True)]
    return {path: functools.reduce(jnp.logical_and, same(a, b), jnp.bool_(True)) for path, (a, b) in pairs.items()}


def check_base(params: Params, other: Params, name: str) -> None:
    """Refuses a tree whose weights below its deltas are not those of another tree.

    Raises:
      DeltaError: naming a path that is missing or differs.
    """
    want, have = (
        {path: node.stripped(w) for path, w in paths.flatten(tree, weights.is_node)} for tree in (params, other)
    )
    missing = sorted(want.keys() ^ have.keys())
    if missing:
        where = "misses" if missing[0] in want else "has"
        raise DeltaError(
            f"{name} {where} {missing[0]}, unlike the others: stack or unstack both, or it is another model"
        )
    pairs = {path: (want[path], have[path]) for path in want if want[path] is not have[path]}
    for path, (a, b) in pairs.items():
        if _shapes(a) != _shapes(b):
            raise DeltaError(f"{name} was made for another base: {path} is {_shapes(b)}, not {_shapes(a)}")
    differs = [path for path, same in jax.device_get(_equal(pairs)).items() if not same]
    if differs:
        raise DeltaError(f"{name} was made for another base, or trained more than LoRA: {differs[0]} differs")


def check_finite(loras: Loras, name: str) -> None:
    """Refuses numbers that are not finite.

    Raises:
      DeltaError: naming the path.
    """
    for path, w in loras.items():
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in (w.a, w.b)):
            raise DeltaError(f"{name} holds numbers at {path} that are not finite")


def factor_of(w: Lora) -> jax.Array:
    """The factor of A B as an array: float32 `[L]` in a stacked tree, a scalar elsewhere."""
    scales = w.scales if isinstance(w, LayeredLora) else jnp.ones(weights.shape_of(w)[:-2])
    return jnp.float32(w.scale) * scales


def _real(w: Lora) -> np.ndarray:
    """`[L, r]` bool: the columns of a stacked A that are not padding."""
    ranks = lora.ranks_of(w)
    count, _, rank = w.a.shape
    return np.ones((count, rank), bool) if ranks is None else lora.columns(ranks, rank)


def _join(each: Sequence[Lora], factors: Sequence[float]) -> Lora:
    """One LoRA whose update is the sum of the others', each times its factor, which goes into B."""
    a = jnp.concatenate([w.a for w in each], axis=-1)
    scaled = lambda w, f: weights.scaled(w.b, (f * factor_of(w))[..., None, None])
    b = jnp.concatenate([scaled(w, f) for w, f in zip(each, factors, strict=True)], axis=-2)
    base, dropout = each[0].base, max(w.dropout for w in each)
    if not any(isinstance(w, LayeredLora) for w in each) or a.ndim == 2:
        return Lora(base, a, b, 1.0, dropout)
    real = np.concatenate([_real(w) for w in each], axis=1)
    ranks = tuple(map(int, real.sum(1)))
    order = np.argsort(~real, axis=1, kind="stable")[:, : max(ranks)]  # real columns first
    a = jnp.take_along_axis(a, order[:, None, :], axis=-1)
    b = jnp.take_along_axis(b, order[:, :, None], axis=-2)
    if len(set(ranks)) == 1:
        return Lora(base, a, b, 1.0, dropout)
    return LayeredLora(base, a, b, 1.0, dropout, scales=jnp.ones(len(ranks)), ranks=ranks)


def concatenated(trees: Sequence[Params], factors: Sequence[float] | None = None) -> Params:
    """One tree whose updates are the sums of the updates of several, exactly; ranks add up.

    Args:
      trees: trees with LoRAs on one base, all stacked or all unstacked. Where a tree has no LoRA it adds nothing.
      factors: one a tree, which its updates are multiplied by; all 1 by default.

    Raises:
      DeltaError: if a tree has no LoRA or other deltas too, or another base.
    """
    factors = [1.0] * len(trees) if factors is None else list(factors)
    if not trees or len(factors) != len(trees):
        raise DeltaError(f"{len(factors)} factors for {len(trees)} trees: give one a tree, and a tree at least")
    each = [loras_of(tree, f"tree {i}") for i, tree in enumerate(trees)]
    for i, tree in enumerate(trees[1:], 1):
        check_base(trees[0], tree, f"tree {i}")

    def joined(path: str, w: Any) -> Any:
        here = [(loras[path], f) for loras, f in zip(each, factors, strict=True) if path in loras]
        return _join(*zip(*here, strict=True)) if here else w

    return paths.map_with_path(joined, trees[0], is_leaf=weights.is_node)


@functools.partial(jax.jit, static_argnums=1)
def nearest(w: Lora, rank: int) -> tuple[jax.Array, jax.Array]:
    """(A, B) of this rank whose product is nearest to the update of `w`; the matrix of the update is not built."""
    a, b = weights.wide(w.a), weights.scaled(weights.wide(w.b), factor_of(w)[..., None, None])
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, v = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    near_a = (q_a @ u[..., :rank]) * jnp.broadcast_to(root[..., None, :], (*a.shape[:-1], rank))
    near_b = jnp.broadcast_to(root[..., :, None], (*b.shape[:-2], rank, b.shape[-1])) * (
        v[..., :rank, :] @ jnp.swapaxes(q_b, -1, -2)
    )
    return near_a.astype(w.a.dtype), near_b.astype(w.b.dtype)


def weighted(trees: Sequence[Params], factors: Sequence[float], rank: int | None = None) -> Params:
    """One tree whose updates are nearest to the weighted sums of the updates of several, in one rank everywhere.

    Args:
      trees: see `concatenated`.
      factors: one a tree.
      rank: of the result; by default the largest rank of the trees at each weight.

    Raises:
      DeltaError: as `concatenated`, or for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise DeltaError(f"rank={rank} must be at least 1")
    each = [loras_of(tree, f"tree {i}") for i, tree in enumerate(trees)]

    def smaller(path: str, w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        chosen = rank or max(loras[path].a.shape[-1] for loras in each if path in loras)
        if chosen >= w.a.shape[-1]:
            return w
        return Lora(w.base, *nearest(w, chosen), 1.0, w.dropout)

    return paths.map_with_path(smaller, concatenated(trees, factors), is_leaf=weights.is_node)
