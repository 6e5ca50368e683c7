"""LoRA and DoRA of a model as the tensors of PEFT's modules."""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse.linalg

from llm_jax.delta import node
from llm_jax.delta.dora import Dora
from llm_jax.delta.lora import LayeredLora, Lora, ranks_of
from llm_jax.delta.scaled import Biased
from llm_jax.interop.huggingface import peft_fused, peft_match, peft_names
from llm_jax.interop.huggingface.peft_fused import Pair
from llm_jax.interop.huggingface.peft_names import Layout, Site, Written
from llm_jax.interop.names import InteropError
from llm_jax.nn import weights

_LEFT = 1e-5  # of a kernel's norm: what rounding leaves beside a difference of rank r


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


def _largest(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, V) of the r largest singular values, the largest first."""
    if rank == min(x.shape):
        return np.linalg.svd(x, full_matrices=False)
    u, s, v = scipy.sparse.linalg.svds(x, rank, v0=np.ones(min(x.shape)))
    return u[:, ::-1], s[::-1], v[::-1]


def against(pair: Pair, first: np.ndarray, now: np.ndarray, path: str) -> Pair:
    """The same sum as `now + scale * a @ b`, as LoRA on `first`: of rank 2r, with minus what a start took out.

    `first - now` is `scale * A0 B0` of the start, so its r singular vectors are as good as A0 and B0.

    Raises:
      InteropError: if the difference is not of rank r.
    """
    first, now = np.asarray(first, np.float64), np.asarray(now, np.float64)
    if np.array_equal(first, now):
        return pair
    u, s, v = _largest(first - now, pair.rank)
    if np.linalg.norm(first - now - (u * s) @ v) > _LEFT * np.linalg.norm(first):
        raise InteropError(f"{path} differs from the original by more than rank {pair.rank}: only what PiSSA and OLoRA "
                           "take out can be put back")  # fmt: skip
    root = np.sqrt(s / pair.scale)
    a0, b0 = (u * root).astype(pair.a.dtype), (root[:, None] * v).astype(pair.b.dtype)
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
        for name, pairs, vectors in _modules(site, flat, deltas, original, is_dora, has_bias):
            pair, ranks = peft_fused.join(pairs, site.widths)
            sizes[name] = (pair.rank, pair.scale)
            parts |= {} if ranks is None else {name: ranks}
            ends = ("lora_embedding_A", "lora_embedding_B") if site.is_table else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{name}.{ends[0]}": pair.a.T, f"{name}.{ends[1]}": pair.b.T}
            if fields.get("tie") and site.kernels == (peft_names.TABLE,):
                output = peft_names.tied_output(layout.config)
                tensors |= {f"{output}.lora_A.weight": pair.b, f"{output}.lora_B.weight": pair.a}
            if is_dora:
                tensors[f"{name}.lora_magnitude_vector"] = np.concatenate(vectors)
            if has_bias:
                bias = np.concatenate(vectors)
                tensors[f"{name}.lora_B.bias"] = (bias / np.float64(pair.scale)).astype(bias.dtype)
    return Written(tensors, parts, fields | _settings(sizes), list(sizes), transposed)


def _on_host(w: Any) -> Any:
    """The same delta with its own arrays in memory; its base stays where it is."""
    if not node.is_delta(w):
        return w
    arrays = {field: None if x is None else np.asarray(x) for field, x in w.leaves().items()}
    return w.replace(base=_on_host(w.base), **arrays)


def _modules(
    site: Site,
    flat: Mapping[str, Any],
    deltas: Mapping[str, Any],
    original: Mapping[str, Any] | None,
    is_dora: bool,
    has_bias: bool,
) -> Iterator[tuple[str, list[Pair | None], list[np.ndarray]]]:
    """(module, LoRA of its parts, vectors of its parts) of every layer of a site that has LoRA.

    The vectors are lengths of columns for DoRA, biases with `has_bias`, and else none.
    """
    nodes = [_on_host(deltas.get(path)) for path in site.kernels]
    dense = lambda w: np.asarray(weights.materialize(w))
    now: list[Any] = [None] * len(nodes)
    first: list[Any] = [None] * len(nodes)
    for i, (path, w) in enumerate(zip(site.kernels, nodes, strict=True)):
        if original is not None and w is not None:
            if path not in original or node.is_delta(original[path]):
                raise InteropError(f"original has no {path} without deltas")
            now[i], first[i] = dense(node.stripped(w)), dense(original[path])
        elif is_dora and w is None:
            now[i] = dense(flat[path])
    for index, name in enumerate(site.names):
        layer = index if site.is_stacked else None
        at = lambda x, layer=layer: x if layer is None else x[layer]
        pairs: list[Pair | None] = []
        vectors = []
        for i, (path, shape) in enumerate(zip(site.kernels, site.shapes, strict=True)):
            w, inner = nodes[i], (slice(0, shape[0]), slice(0, shape[1]))
            lora = None if w is None else lora_of(w)
            pair = None if lora is None else _pair(lora, layer, shape)
            if pair is not None and first[i] is not None:
                pair = against(pair, at(first[i])[inner], at(now[i])[inner], path)
            pairs.append(pair)
            if is_dora:
                vectors.append(np.linalg.norm(at(now[i])[inner], axis=0) if w is None else at(w.magnitude)[: shape[1]])
            elif has_bias:
                vectors.append(np.zeros(shape[1], np.float32) if w is None else at(w.shift)[: shape[1]])
        if any(pairs):
            yield name, pairs, vectors


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
