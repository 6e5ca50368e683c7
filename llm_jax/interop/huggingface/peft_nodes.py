"""Deltas around the kernels of a model from the tensors of PEFT's modules."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.delta import dora, node
from llm_jax.delta.lora import LayeredLora, Lora
from llm_jax.delta.rows import TokenRows
from llm_jax.delta.scaled import Biased, Scaled
from llm_jax.delta.starts import olora
from llm_jax.interop.huggingface import peft_fused, peft_match, peft_names
from llm_jax.interop.huggingface.peft_config import REMEDY, AdapterConfig
from llm_jax.interop.huggingface.peft_fused import Pair
from llm_jax.interop.huggingface.peft_names import PREFIX, Layout, Site
from llm_jax.interop.huggingface.peft_tensors import Tensors
from llm_jax.interop.names import InteropError, some
from llm_jax.nn import weights

_GAP = 1e-6  # of the largest singular value: nearer ones are the same to float32


def check_bare(folder: epath.Path, site: Site, flat: Mapping[str, Any]) -> None:
    """Refuses kernels that carry a delta already.

    Raises:
      InteropError: naming the kernel.
    """
    for path in site.kernels:
        if node.is_delta(flat[path]):
            raise InteropError(f"{folder}: {path} carries {flat[path].name} already; merge or detach it first")


def _pairs(
    tensors: Tensors, config: AdapterConfig, layout: Layout, site: Site, layers: Iterable[int]
) -> Iterator[tuple[int, str, Pair]]:
    """(layer, module, A and B) of the layers of a site."""
    (fan_in, _), fan_out = site.shapes[0], sum(site.widths)
    for layer in layers:
        name = site.names[layer]
        rank = config.rank_of(name)
        ends = ("lora_embedding_A", "lora_embedding_B") if site.is_table else ("lora_A.weight", "lora_B.weight")
        a = tensors.take(f"{name}.{ends[0]}", (rank, fan_in)).T
        b = tensors.take(f"{name}.{ends[1]}", (fan_out, rank)).T
        yield layer, name, Pair(a, b, config.scale_of(name))
        if site.kernels == (peft_names.TABLE,):
            _check_tied(tensors, config, layout, name, a, b)


def _check_tied(
    tensors: Tensors, config: AdapterConfig, layout: Layout, name: str, a: np.ndarray, b: np.ndarray
) -> None:
    """LoRA on a shared table must stand on the output layer too, as it does here."""
    if peft_names.has_copies(layout.config):
        raise InteropError(f"{tensors.folder}: LoRA on {name} has no effect in PEFT: lookups read copies of the table")
    output = peft_names.tied_output(layout.config)
    if output is None:
        return
    if not config.tie or config.dora:
        raise InteropError(f"{tensors.folder} unties the output layer {output} from {name}; the base ties them: set "
                           "ensure_weight_tying in PEFT")  # fmt: skip
    again = tensors.take(f"{output}.lora_A.weight", b.shape), tensors.take(f"{output}.lora_B.weight", a.shape)
    if not (np.array_equal(again[0], b) and np.array_equal(again[1], a)):
        raise InteropError(f"{tensors.folder}: {output} and {name} share a table and have different LoRAs")


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths) if size > array.shape[axis] else array


def _node(w: Any, pairs: Sequence[Pair | None], is_stacked: bool, dropout: float) -> Lora:
    """A LoRA around a weight from those of its layers, None where a layer has none."""
    fan_in, fan_out = weights.shape_of(w)[-2:]
    ranks = [0 if p is None else p.rank for p in pairs]
    scales = [0.0 if p is None else p.scale for p in pairs]
    rank, like = max(ranks), next(p for p in pairs if p is not None)
    none = Pair(np.zeros((fan_in, 0), like.a.dtype), np.zeros((0, fan_out), like.b.dtype), 0.0)
    full = [none if p is None else p for p in pairs]
    a = [_padded(_padded(p.a, 0, fan_in), 1, rank) for p in full]
    b = [_padded(_padded(p.b, 1, fan_out), 0, rank) for p in full]
    both = [jnp.asarray(np.stack(x) if is_stacked else x[0]) for x in (a, b)]
    if len(set(ranks)) == len(set(scales)) == 1:
        return Lora(w, both[0], both[1], scales[0], dropout)
    return LayeredLora(w, both[0], both[1], 1.0, dropout, scales=jnp.asarray(scales, jnp.float32), ranks=tuple(ranks))


def _vectors(rows: Mapping[int, np.ndarray], w: Any, is_stacked: bool, fill: Any, width: int) -> jax.Array:
    """Vectors of the layers of a weight; other layers take their row of `fill`, or the number `fill`."""
    count = weights.shape_of(w)[0] if is_stacked else 1
    usual = np.broadcast_to(np.asarray(fill, next(iter(rows.values())).dtype), (count, width))
    out = [_padded(rows[layer], 0, width) if layer in rows else usual[layer] for layer in range(count)]
    return jnp.asarray(np.stack(out) if is_stacked else out[0])


def lora(
    tensors: Tensors, config: AdapterConfig, layout: Layout, flat: Mapping[str, Any], site: Site, layers: list[int]
) -> dict[str, Any]:
    """LoRA, DoRA, B's biases, on the kernels of a site."""
    kernels, count = site.kernels, len(site.names)
    pairs: list[list[Pair | None]] = [[None] * count for _ in kernels]
    vectors: list[dict[int, np.ndarray]] = [{} for _ in kernels]  # lengths of columns, or biases
    end = "lora_magnitude_vector" if config.dora else "lora_B.bias" if config.lora_bias else ""
    base = {path: flat[path] for path in kernels}
    for layer, name, pair in _pairs(tensors, config, layout, site, layers):
        if config.start:
            base = _started(tensors.folder, config, site, base, layer, pair)
        whole = tensors.take(f"{name}.{end}", (sum(site.widths),)) if end else np.zeros(sum(site.widths))
        if config.lora_bias:
            whole = (whole * np.float64(pair.scale)).astype(whole.dtype)
        parts = peft_fused.split(pair, site.widths, tensors.parts.get(name))
        for i, (part, piece) in enumerate(zip(parts, peft_fused.cut(whole, site.widths), strict=True)):
            if part is not None:
                pairs[i][layer], vectors[i][layer] = part, piece
    out: dict[str, Any] = {}
    for i, path in enumerate(kernels):
        if not any(pairs[i]):
            continue
        w: Any = _node(base[path], pairs[i], site.is_stacked, config.dropout)
        width = weights.shape_of(w)[-1]
        if config.dora:
            squares = dora.squares_of(w.base)
            w = dora.Dora(w, _vectors(vectors[i], w, site.is_stacked, np.sqrt(squares), width), squares)
        elif config.lora_bias:
            w = Biased(w, _vectors(vectors[i], w, site.is_stacked, 0.0, width))
        out[path] = w
    return out


def _started(
    folder: epath.Path, config: AdapterConfig, site: Site, base: dict[str, Any], layer: int, pair: Pair
) -> dict[str, Any]:
    """The kernels of a site with what PiSSA or OLoRA takes out of one layer, as PEFT does when it loads them."""
    name, out = site.names[layer], dict(base)
    if site.is_table or (config.start == "olora" and not site.transposed):
        raise InteropError(f"{folder}: init_lora_weights={config.start!r} cannot start {name} in PEFT")
    if any(weights.is_node(w) for w in base.values()):
        kind = type(base[site.kernels[0]]).__name__
        raise InteropError(f"{folder}: init_lora_weights={config.start!r} needs the plain matrix of {name}, not {kind}")
    at = lambda w: jnp.asarray(w[layer] if site.is_stacked else w)
    whole = jnp.concatenate([at(base[path]) for path in site.kernels], axis=-1)
    if config.start == "pissa":  # to the last bit, because the file holds what trained and not where it began
        u, s, v = np.linalg.svd(np.asarray(whole, np.float64), full_matrices=False)
        if pair.rank < len(s) and s[pair.rank - 1] - s[pair.rank] < _GAP * s[0]:
            raise InteropError(f"{folder}: {name} has equal singular values {pair.rank} and {pair.rank + 1}, so that "
                               f"pissa may start in several ways{REMEDY['init_lora_weights']}")  # fmt: skip
        taken = (u[:, : pair.rank] * s[: pair.rank]) @ v[: pair.rank]
        left = whole - jnp.asarray(taken, whole.dtype)
    else:
        left = olora(whole, pair.rank, pair.scale)[0]
    for path, piece in zip(site.kernels, jnp.split(left, np.cumsum(site.widths)[:-1], axis=-1), strict=True):
        out[path] = jnp.asarray(base[path]).at[layer].set(piece) if site.is_stacked else piece
    return out


def ia3(
    tensors: Tensors, config: AdapterConfig, layout: Layout, flat: Mapping[str, Any], site: Site, layers: list[int]
) -> dict[str, Any]:
    """Factors on the kernels of a site: `[out, 1]`, or `[1, in]` in the feed-forward, where inputs are scaled."""
    del layout
    if site.is_table:
        raise InteropError(f"{tensors.folder}: IA3 on the table {site.names[0]} is not possible")
    rows: list[dict[int, np.ndarray]] = [{} for _ in site.kernels]
    kinds = set()
    for layer in layers:
        name = site.names[layer]
        stored = tensors.arrays.get(f"{name}.ia3_l")
        is_input = stored is not None and stored.ndim == 2 and stored.shape[0] == 1
        if config.feedforward is not None:
            is_input = peft_match.is_named(config.feedforward, name)
        kinds.add(is_input)
        shape = (1, site.shapes[0][0]) if is_input else (sum(site.widths), 1)
        vector = tensors.take(f"{name}.ia3_l", shape).reshape(-1)
        pieces = [vector] * len(rows) if is_input else peft_fused.cut(vector, site.widths)
        present = tensors.parts.get(name, [1] * len(rows))
        for row, piece, is_there in zip(rows, pieces, present, strict=True):
            if is_there:
                row[layer] = piece
    if len(kinds) > 1:
        raise InteropError(
            f"{tensors.folder}: IA3 scales inputs of {site.names[0]} in some layers and outputs in others"
        )
    inputs, out = kinds.pop(), {}
    for path, row in zip(site.kernels, rows, strict=True):
        if row:
            width = weights.shape_of(flat[path])[-2 if inputs else -1]
            out[path] = Scaled(flat[path], _vectors(row, flat[path], site.is_stacked, 1.0, width), inputs)
    return out


def rows(tensors: Tensors, config: AdapterConfig, layout: Layout, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Trained rows of tables."""
    out: dict[str, Any] = {}
    inner = "" if config.kind == "TRAINABLE_TOKENS" else "token_adapter."
    shared: np.ndarray | None = None
    for end, ids in config.tokens.items():
        tables = [site for site in layout.sites if site.is_table and not site.is_stacked]
        named = lambda site: peft_names.tokens_name(layout.config, site)
        site = layout.of_table() if not end else next((s for s in tables if peft_match.is_tail(end, named(s))), None)
        if site is None:
            raise InteropError(f"{tensors.folder}: trained tokens of {end!r} are not rows of a table of this model")
        path, name, (size, width) = site.kernels[0], named(site), site.shapes[0]
        if len(set(ids)) < len(ids) or not all(0 <= i < size for i in ids):
            raise InteropError(f"{tensors.folder}: trained tokens {some(list(map(str, ids)))} must be different "
                               f"numbers from 0 to {size - 1}")  # fmt: skip
        check_bare(tensors.folder, site, {path: out.get(path, flat[path])})
        stored = tensors.take(f"{name}.{inner}trainable_tokens_delta", (len(ids), width))
        order = np.argsort(ids)
        out[path] = TokenRows(flat[path], jnp.asarray(stored[order]), tuple(int(ids[i]) for i in order))
        if path == peft_names.TABLE:
            peft_names.check_rows(layout.config)
            shared = stored
    if shared is not None and layout.shares_table:  # a tied output layer's rows are stored once more
        for copy in [name for name in tensors.arrays if name.endswith(".trainable_tokens_delta")]:
            if not np.array_equal(tensors.take(copy, shared.shape), shared):
                raise InteropError(f"{tensors.folder} unties {PREFIX}{copy} from the table; the base ties them")
    return out
