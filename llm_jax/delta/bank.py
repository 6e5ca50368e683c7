"""A bank holds K LoRAs over one base; every row of a batch chooses one.

    params, names = bank.make({"sql": with_sql, "chat": with_chat})
    params = bank.choose(params, ["chat", "sql", "base", "chat"], names)     # a batch of four rows
    generator = Generator(model, params)
    generator.params = bank.choose(generator.params, ["sql", "sql"], names)  # the next batch has two
    generator.params = bank.put(generator.params, "chat", with_chat_2, names)

The choice is a leaf of the nodes: all of this returns new trees, and another choice or adapter of the same shapes
compiles nothing again. A batch of another number of rows needs another choice, and is refused until it has one.

Source: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", https://arxiv.org/abs/2310.18547. The arithmetic is in
`delta.by_row`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.delta import combine
from llm_jax.delta.by_row import Bank
from llm_jax.delta.lora import LayeredLora, Lora
from llm_jax.delta.node import DeltaError
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import unstack

__all__ = ["BASE", "Bank", "adapter", "choose", "make", "put", "repeated"]

BASE = "base"  # the name of no adapter
# kernels that multiply encodings of distances, which all rows share: XLNet's, and those of relative scores
SHARED = ("*attention/position/kernel", "*attention/relative/*")


def _is_bank(w: Any) -> bool:
    return isinstance(w, Bank)


def _banks(params: Params) -> dict[str, Bank]:
    found = {path: w for path, w in paths.flatten(params, weights.is_node) if isinstance(w, Bank)}
    if not found:
        raise DeltaError("there is no bank in these parameters: make one with bank.make")
    return found


def _map(fn: Any, params: Params) -> Params:
    return jax.tree.map(lambda w: fn(w) if _is_bank(w) else w, params, is_leaf=weights.is_node)


@functools.partial(jax.jit, static_argnums=1)
def _padded(w: Lora, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, B, scale) with zeros up to a rank."""
    more = rank - w.a.shape[-1]
    lead = [(0, 0)] * (w.a.ndim - 2)
    a, b = jnp.pad(w.a, [*lead, (0, 0), (0, more)]), jnp.pad(w.b, [*lead, (0, more), (0, 0)])
    return a, b, combine.factor_of(w)


@jax.jit
def _stacked(each: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
    a, b, scales = zip(*each, strict=True)
    return jnp.stack(a, axis=-2), jnp.stack(b, axis=-3), jnp.stack(scales, axis=-1)


def make(adapters: Mapping[str, Params]) -> tuple[Params, tuple[str, ...]]:
    """A bank of LoRAs.

    Args:
      adapters: trees with LoRAs on one base, all stacked or all unstacked. Targets and ranks may differ: where a tree
        has no LoRA, its adapter changes nothing. Their dropout is left out: a bank serves.

    Returns:
      (the base with a `Bank` wherever a tree has LoRA; the names, in the order of the adapters' numbers).

    Raises:
      DeltaError: if there is no adapter, one is called "base", carries other deltas than LoRA, holds numbers that are
        not finite or was made for another base, or LoRA stands on a kernel of positions, which have no rows.
    """
    if not adapters:
        raise DeltaError("a bank needs one adapter at least")
    if BASE in adapters:
        raise DeltaError(f"an adapter cannot be called {BASE!r}, which names the rows without any")
    first, *_ = adapters.values()
    each = []
    for name, tree in adapters.items():
        each.append(_checked(first, tree, name))
    shared = [path for loras in each for path in loras if paths.matcher(SHARED)(path)]
    if shared:
        raise DeltaError(f"{shared[0]} multiplies distances, which all rows of a batch share: leave it out of targets")

    def banked(path: str, w: Any) -> Any:
        here = [loras[path] for loras in each if path in loras]
        if not here:
            return w
        rank = max(x.a.shape[-1] for x in here)
        empty = here[0].replace(a=jnp.zeros_like(here[0].a), b=jnp.zeros_like(here[0].b))
        numbers = [_padded(loras.get(path, empty), rank) for loras in each]
        return Bank(here[0].base, *_stacked(numbers))

    return paths.map_with_path(banked, first, is_leaf=weights.is_node), tuple(adapters)


def _checked(base: Params, tree: Params, name: str) -> combine.Loras:
    label = f"adapter {name!r}"
    loras = combine.loras_of(tree, label)
    combine.check_finite(loras, label)
    combine.check_base(base, tree, label)
    return loras


def _number(which: str | int, names: Sequence[str], count: int) -> int:
    if isinstance(which, str):
        if which == BASE:
            return -1
        if which not in names:
            raise DeltaError(f"adapter {which!r} is not in the bank: there are {', '.join((*names, BASE))}")
        return list(names).index(which)
    if not -1 <= which < count:
        raise DeltaError(f"adapter {which} is not in the bank: there are 0 to {count - 1}, and -1 for none")
    return int(which)


def choose(params: Params, rows: str | int | Sequence[str | int] | jax.Array, names: Sequence[str] = ()) -> Params:
    """Says which adapter each row of the next batches uses.

    Args:
      params: with banks; laid out for serving too.
      rows: a name or a number a row, "base" or -1 for none; a single one holds for all rows of any batch. An array of
        integers may be traced; what it holds out of range gives results that are not numbers.
      names: as `make` returned them.

    Raises:
      DeltaError: if there is no bank, a name is unknown or a number out of range.
    """
    count = next(iter(_banks(params).values())).scales.shape[-1]
    if names and len(names) != count:
        raise DeltaError(f"{len(names)} names for a bank of {count} adapters")
    if isinstance(rows, jax.Array):
        ids = rows.astype(jnp.int32)
    elif isinstance(rows, str | int | np.integer):
        ids = jnp.asarray(_number(rows, names, count), jnp.int32)
    else:
        ids = jnp.asarray([_number(which, names, count) for which in rows], jnp.int32)
    return _map(lambda w: w.replace(ids=jnp.broadcast_to(ids, (*w.scales.shape[:-1], *ids.shape))), params)


def repeated(params: Params, times: int) -> Params:
    """The choices for a batch in which each row stands several times in succession, as beams do."""
    if times == 1:
        return params

    def again(w: Bank) -> Bank:
        if w.ids is None or w.ids.ndim < w.scales.ndim:  # one for all rows
            return w
        return w.replace(ids=jnp.repeat(w.ids, times, axis=-1))

    return _map(again, params)


@jax.jit
def _written(w: Bank, slot: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> Bank:
    return w.replace(
        a=w.a.at[..., slot, :].set(a.astype(w.a.dtype)),
        b=w.b.at[..., slot, :, :].set(b.astype(w.b.dtype)),
        scales=w.scales.at[..., slot].set(scale),
    )


def put(params: Params, slot: str | int, adapter: Params, names: Sequence[str] = ()) -> Params:
    """Swaps an adapter; shapes stay, so nothing that runs with the bank is compiled again.

    Args:
      params: with banks; laid out for serving too.
      slot: name or number of the adapter that goes. The new one has its name, unless you change `names`.
      adapter: a tree with LoRAs on the bank's base, stacked or not, of no higher ranks.
      names: as `make` returned them.

    Raises:
      DeltaError: as `make`, if the slot is unknown, or LoRA stands where the bank has none or has a higher rank.
    """
    banks = _banks(params)
    number = _number(slot, names, next(iter(banks.values())).scales.shape[-1])
    if number < 0:
        raise DeltaError("rows without an adapter have no place in the bank: name one of its adapters")
    is_same = [p for p, _ in paths.flatten(params, weights.is_node)] == [
        p for p, _ in paths.flatten(adapter, weights.is_node)
    ]
    loras = _checked(params, adapter if is_same else unstack(adapter), str(slot))
    for path, w in loras.items():
        if path not in banks:
            raise DeltaError(f"adapter {slot!r} has LoRA at {path}, where the bank has none: make a new bank")
        if w.a.shape[-1] > banks[path].a.shape[-1]:
            raise DeltaError(
                f"adapter {slot!r} has rank {w.a.shape[-1]} at {path}, the bank {banks[path].a.shape[-1]}: make a new "
                "bank"
            )

    def written(path: str, w: Any) -> Any:
        if path not in banks:
            return w
        if path in loras:
            return _written(w, number, *_padded(loras[path], w.a.shape[-1]))
        zeros = (jnp.zeros_like(w.a[..., 0, :]), jnp.zeros_like(w.b[..., 0, :, :]), jnp.zeros_like(w.scales[..., 0]))
        return _written(w, number, *zeros)

    return paths.map_with_path(written, params, is_leaf=weights.is_node)


def adapter(params: Params, slot: str | int, names: Sequence[str] = ()) -> Params:
    """Takes one adapter out of the bank, as LoRA, which merges and is saved.

    Raises:
      DeltaError: if there is no bank, or the slot is unknown or the base's.
    """
    number = _number(slot, names, next(iter(_banks(params).values())).scales.shape[-1])
    if number < 0:
        raise DeltaError("rows without an adapter have no place in the bank: name one of its adapters")

    def alone(w: Bank) -> Lora:
        a, b, scales = w.a[..., number, :], w.b[..., number, :, :], np.asarray(w.scales[..., number])
        if len(np.unique(scales)) == 1:
            return Lora(w.base, a, b, float(scales.flat[0]))
        return LayeredLora(w.base, a, b, 1.0, scales=jnp.asarray(scales), ranks=(a.shape[-1],) * len(scales))

    return _map(alone, params)
