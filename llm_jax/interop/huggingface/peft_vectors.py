"""IA3's factors and trained rows of tables as the tensors of PEFT's modules."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.interop.huggingface import peft_names
from llm_jax.interop.huggingface.peft_config import AdapterConfig
from llm_jax.interop.huggingface.peft_names import Layout, Written
from llm_jax.interop.names import InteropError, some
from llm_jax.models.transformer import TransformerConfig


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
        tensors, parts, {"feedforward": peft_names.ends(layout, names[True])}, names[False] + names[True], transposed
    )


def rows(
    layout: Layout, config: AdapterConfig, deltas: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """Trained rows of tables as PEFT's tensors, and what the config says of them.

    Raises:
      InteropError: for a weight that is not a table there, or a table whose rows PEFT cannot run.
    """
    tensors, tokens = {}, {}
    pure = config.kind == "TRAINABLE_TOKENS"
    if pure and len(deltas) > 1:
        raise InteropError(f"trained rows of {some(sorted(deltas))} have no place in PEFT's format: it has one table")
    for path, w in deltas.items():
        site = next((s for s in layout.sites if s.kernels == (path,) and s.is_table and not s.is_stacked), None)
        if site is None:
            raise InteropError(
                f"trained token rows on {path} have no place in PEFT's format: that is not a table there"
            )
        if path == peft_names.TABLE:
            peft_names.check_rows(layout.config)
            if pure and isinstance(layout.config, TransformerConfig):
                raise InteropError("trained token rows alone have no place in PEFT's format for Marian: PEFT cannot "
                                   "run them; train LoRA beside them")  # fmt: skip
        name = peft_names.tokens_name(layout.config, site)
        tensors[f"{name}.{'' if pure else 'token_adapter.'}trainable_tokens_delta"] = np.asarray(w.rows)
        tokens["" if path == peft_names.TABLE and len(deltas) == 1 and not pure else name] = w.ids
    config = dataclasses.replace(config, tokens=tokens)
    return dataclasses.replace(config, targets=tuple(tokens)) if pure else config, tensors
