"""LoRA and DoRA of a model as the tensors of PEFT's modules."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.delta import node
from llm_jax.delta.dora import Dora
from llm_jax.delta.lora import LayeredLora, Lora, ranks_of
from llm_jax.delta.scaled import Biased
from llm_jax.interop.huggingface import peft_fused, peft_match, peft_names
from llm_jax.interop.huggingface.peft_fused import Pair
from llm_jax.interop.huggingface.peft_names import Layout, Site
from llm_jax.interop.names import InteropError
from llm_jax.nn import weights

_LEFT = 1e-5  # of a kernel's norm: what rounding leaves beside a difference of rank r


class Written(NamedTuple):
    """LoRA as PEFT stores it.

    Attributes:
      tensors: theirs, by name without PEFT's prefix.
      parts: module -> ranks of its parts, where they are side by side.
      fields: of `AdapterConfig`.
      modules: names of the adapted modules.
      transposed: whether kernels of adapted layers are `[out, in]` there.
    """

    tensors: dict[str, np.ndarray]
    parts: dict[str, list[int]]
    fields: dict[str, Any]
    modules: list[str]
    transposed: bool


def lora_of(w: Any) -> Lora | None:
    """The LoRA of a weight, below a DoRA or a bias."""
    return next((x for x in node.layers_of(w) if isinstance(x, Lora)), None)


def _pair(w: Lora, layer: int | None, shape: tuple[int, int]) -> Pair | None:
    """A and B of a layer without padding; None where it has none."""
    ranks = ranks_of(w)
    rank = w.a.shape[-1] if ranks is None or layer is None else ranks[layer]
    if rank == 0:
        return None
    at = lambda x: np.asarray(x if layer is None else x[layer])
    scale = w.scale * float(at(w.scales)) if isinstance(w, LayeredLora) else w.scale
    return Pair(at(w.a)[: shape[0], :rank], at(w.b)[:rank, : shape[1]], scale)


def against(pair: Pair, first: np.ndarray, now: np.ndarray, path: str) -> Pair:
    """The same sum as `now + scale * a @ b`, as LoRA on `first`: of rank 2r, with minus what a start took out.

    `first - now` is `scale * A0 B0` of the start, so its r singular vectors are as good as A0 and B0.

    Raises:
      InteropError: if the difference is not of rank r.
    """
    first, now = np.asarray(first, np.float64), np.asarray(now, np.float64)
    if np.array_equal(first, now):
        return pair
    rank = pair.rank
    u, s, v = np.linalg.svd(first - now, full_matrices=False)
    if np.linalg.norm(s[rank:]) > _LEFT * np.linalg.norm(first):
        raise InteropError(f"{path} differs from the original by more than rank {rank}: only what PiSSA and OLoRA take "
                           "out can be put back")  # fmt: skip
    root = np.sqrt(s[:rank] / pair.scale)
    a0, b0 = (u[:, :rank] * root).astype(pair.a.dtype), (root[:, None] * v[:rank]).astype(pair.b.dtype)
    return Pair(np.concatenate([pair.a, a0], axis=1), np.concatenate([pair.b, -b0]), pair.scale)


def _alpha(scale: float, rank: int, rs: bool) -> tuple[float, bool]:
    """(the roundest alpha that gives this scale, whether it does to the last bit)."""
    divisor = math.sqrt(rank) if rs else float(rank)
    near = scale * divisor
    tries = [
        *(round(near, digits) for digits in range(8)),
        near,
        math.nextafter(near, 0),
        math.nextafter(near, math.inf),
    ]
    equal = [alpha for alpha in tries if alpha / divisor == scale]
    if not equal and scale == np.float32(scale):  # scales by layer are float32
        equal = [alpha for alpha in tries if np.float32(alpha / divisor) == np.float32(scale)]
    return (equal[0], True) if equal else (near, False)


def _settings(sizes: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Rank, alpha and their patterns from each module's (rank, scale)."""
    rs = not all(_alpha(s, r, False)[1] for r, s in sizes.values()) and all(
        _alpha(s, r, True)[1] for r, s in sizes.values()
    )
    values = {name: (rank, _alpha(scale, rank, rs)[0]) for name, (rank, scale) in sizes.items()}
    (rank, alpha), _ = collections.Counter(values.values()).most_common(1)[0]

    def patterns(index: int, usual: float) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for value in sorted({v[index] for v in values.values()} - {usual}):
            same = [name for name, v in values.items() if v[index] == value]
            others = [name for name in values if name not in same]
            out |= dict.fromkeys(peft_match.shortest(same, others, peft_match.is_pattern), value)
        return out

    return {"rank": rank, "alpha": alpha, "rs": rs, "ranks": patterns(0, rank), "alphas": patterns(1, alpha)}


def _uniform(deltas: Mapping[str, Any], test: Any, what: str) -> Any:
    found = {test(w) for w in deltas.values()}
    if len(found) > 1:
        raise InteropError(f"{what} on all modules with LoRA or on none can be stored in PEFT's format: "
                           f"{', '.join(sorted(p for p, w in deltas.items() if not test(w))[:3])} differ")  # fmt: skip
    return found.pop()


def write(
    layout: Layout, flat: Mapping[str, Any], deltas: Mapping[str, Any], original: Mapping[str, Any] | None
) -> Written:
    """LoRA, DoRA and B's biases as PEFT's tensors.

    Args:
      layout: the family's names.
      flat: our parameters.
      deltas: the weights with LoRA among them.
      original: parameters of before a start that changed the base.

    Raises:
      InteropError: if deltas differ where PEFT has one setting, or stand where it has no place.
    """
    is_dora = _uniform(deltas, lambda w: isinstance(w, Dora), "DoRA")
    has_bias = _uniform(deltas, lambda w: isinstance(w, Biased), "a bias (lora_bias)")
    dropout = {lora_of(w).dropout for w in deltas.values()}  # type: ignore[union-attr]
    if len(dropout) > 1:
        raise InteropError(f"LoRA nodes differ in dropout: {sorted(dropout)}; PEFT's format has one")
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[int]] = {}
    sizes: dict[str, tuple[int, float]] = {}
    fields: dict[str, Any] = {"dora": is_dora, "lora_bias": has_bias, "dropout": dropout.pop()}
    transposed = True
    for site in (s for s in layout.sites if deltas.keys() & set(s.kernels)):
        transposed &= site.transposed or site.is_table
        fields |= _check_table(layout, site, is_dora, has_bias)
        for index, name in enumerate(site.names):
            layer = index if site.is_stacked else None
            pairs = [_stored(deltas.get(path), flat, original, path, layer, shape)
                     for path, shape in zip(site.kernels, site.shapes, strict=True)]  # fmt: skip
            if not any(pairs):
                continue
            pair, ranks = peft_fused.join(pairs, site.widths)
            sizes[name] = (pair.rank, pair.scale)
            parts |= {} if ranks is None else {name: ranks}
            ends = ("lora_embedding_A", "lora_embedding_B") if site.is_table else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{name}.{ends[0]}": pair.a.T, f"{name}.{ends[1]}": pair.b.T}
            if fields.get("tie") and site.is_table and site.kernels == (peft_names.TABLE,):
                output = peft_names.tied_output(layout.config)
                tensors |= {f"{output}.lora_A.weight": pair.b, f"{output}.lora_B.weight": pair.a}
            if is_dora:
                lengths = [
                    _length(flat[path], layer, width) for path, width in zip(site.kernels, site.widths, strict=True)
                ]
                tensors[f"{name}.lora_magnitude_vector"] = np.concatenate(lengths)
            if has_bias:
                shifts = [
                    _shift(flat[path], layer, width) for path, width in zip(site.kernels, site.widths, strict=True)
                ]
                bias = np.concatenate(shifts)
                tensors[f"{name}.lora_B.bias"] = (bias / np.float64(pair.scale)).astype(bias.dtype)
    return Written(tensors, parts, fields | _settings(sizes), list(sizes), transposed)


def _stored(
    w: Any,
    flat: Mapping[str, Any],
    original: Mapping[str, Any] | None,
    path: str,
    layer: int | None,
    shape: tuple[int, int],
) -> Pair | None:
    lora = None if w is None else lora_of(w)
    pair = None if lora is None else _pair(lora, layer, shape)
    if pair is None or original is None:
        return pair
    at = lambda x: np.asarray(weights.materialize(x))[... if layer is None else layer]
    if path not in original or node.is_delta(original[path]):
        raise InteropError(f"original has no plain {path}")
    return against(pair, at(original[path])[: shape[0], : shape[1]], at(node.stripped(w))[: shape[0], : shape[1]], path)


def _check_table(layout: Layout, site: Site, is_dora: bool, has_bias: bool) -> dict[str, Any]:
    """Fields that an adapted table asks for; refuses one that PEFT has no place for."""
    path = site.kernels[0]
    if site.is_table and (has_bias or site.is_stacked):
        raise InteropError(f"a bias on the table {path} has no place in PEFT's format")
    if path != peft_names.TABLE:
        return {}
    if peft_names.has_copies(layout.config):
        raise InteropError(
            f"LoRA on {path} has no place in PEFT's format: lookups read copies of {site.names[0]} there"
        )
    tied = peft_names.tied_output(layout.config) is not None
    if tied and is_dora:
        raise InteropError(f"DoRA on {path} has no place in PEFT's format: the output layer shares the table")
    return {"tie": tied}


def _length(w: Any, layer: int | None, width: int) -> np.ndarray:
    """Lengths of columns, where there is no DoRA those of the matrix."""
    at = lambda x: np.asarray(x if layer is None else x[layer])[..., :width]
    return at(w.magnitude) if isinstance(w, Dora) else np.linalg.norm(at(weights.materialize(w)), axis=0)


def _shift(w: Any, layer: int | None, width: int) -> np.ndarray:
    if not isinstance(w, Biased):
        return np.zeros(width, np.float32)
    return np.asarray(w.shift if layer is None else w.shift[layer])[:width]


def ia3(layout: Layout, flat: Mapping[str, Any], deltas: Mapping[str, Any]) -> Written:
    """IA3 as PEFT's tensors: `[out, 1]`, or `[1, in]` where inputs are scaled.

    Raises:
      InteropError: for factors on a table, or on the inputs of a fused layer that differ.
    """
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[int]] = {}
    names: dict[bool, list[str]] = {False: [], True: []}
    transposed = True
    for site in (s for s in layout.sites if deltas.keys() & set(s.kernels)):
        transposed &= site.transposed
        if site.is_table:
            raise InteropError(f"IA3 on {site.kernels[0]} has no place in PEFT's format: it is a table")
        found = [deltas.get(path) for path in site.kernels]
        inputs = next(w.inputs for w in found if w is not None)
        for index, name in enumerate(site.names):
            at = lambda x, index=index, site=site: np.asarray(x[index] if site.is_stacked else x)
            sizes = [(site.shapes[0][0] if inputs else width) for width in site.widths]
            factors = [
                np.ones(n, np.float32) if w is None else at(w.factor)[:n] for w, n in zip(found, sizes, strict=True)
            ]
            if inputs and any(w is None or not w.inputs or not np.array_equal(f, factors[0])
                              for w, f in zip(found, factors, strict=True)):  # fmt: skip
                raise InteropError(f"IA3 on inputs of {site.kernels[0]} has no place in PEFT's format: {name} is one "
                                   "layer there and its parts' factors differ")  # fmt: skip
            if not inputs and any(w is not None and w.inputs for w in found):
                raise InteropError(
                    f"IA3 on {site.kernels[0]} scales inputs of some parts of {name} and outputs of others"
                )
            tensors[f"{name}.ia3_l"] = factors[0][None] if inputs else np.concatenate(factors)[:, None]
            if None in found:
                parts[name] = [int(w is not None) for w in found]
            names[inputs].append(name)
    return Written(
        tensors, parts, {"feedforward": _ends(layout, names[True], ())}, names[False] + names[True], transposed
    )


def _ends(layout: Layout, modules: Sequence[str], extra: Sequence[str]) -> tuple[str, ...]:
    others = layout.modules - set(modules) - set(extra)
    return tuple(peft_match.shortest(modules, others, peft_match.is_end))
