"""Parameters of the base that an adapter's file holds: modules stored whole, biases, tables, tuned norms."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.interop import names, pretrained
from llm_jax.interop.huggingface import peft_match, peft_names
from llm_jax.interop.huggingface.peft_config import AdapterConfig
from llm_jax.interop.huggingface.peft_names import PREFIX, Layout
from llm_jax.interop.huggingface.peft_tensors import Tensors
from llm_jax.interop.names import InteropError, Rule
from llm_jax.nn import paths, weights


def real_rows(config: Any) -> dict[str, int]:
    """Our path -> rows in their file, of what may be padded here."""
    return dict.fromkeys(pretrained.PADDED, getattr(config, "vocab_size", 0))


def written(rules: Sequence[Rule], flat: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Their tensors of some of our parameters."""
    chosen = paths.nested((r.ours, flat[r.ours]) for r in rules)
    return dict(names.write_params(chosen, rules, real_rows(config)))


def _required(config: AdapterConfig, layout: Layout, flat: Mapping[str, Any], adapted: Sequence[str]) -> set[str]:
    """Names of tensors that the file must hold whole."""
    every = {name for r in layout.rules for name in r.names(weights.shape_of(flat[r.ours]))}
    wanted = {name for name in every if peft_match.is_saved(config.saved, peft_names.module_of(name))}
    if config.kind == "LN_TUNING":
        wanted |= {name for name in every if peft_match.is_target(config, peft_names.module_of(name))}
    if config.bias == "all":
        wanted |= {name for name in every if name.endswith(".bias")}
    elif config.bias == "lora_only":
        wanted |= {f"{module}.bias" for module in adapted} & every
    return wanted


def read_whole(
    tensors: Tensors, config: AdapterConfig, layout: Layout, flat: Mapping[str, Any], adapted: Sequence[str]
) -> dict[str, Any]:
    """Our parameters that the file replaces, by path; their tensors are taken out of `tensors`.

    Args:
      tensors: the file's.
      config: the adapter's.
      layout: the family's names.
      flat: our parameters.
      adapted: names of the modules that carry LoRA or IA3.

    Raises:
      InteropError: if a tensor is missing or misshapen, or an output layer differs from the table that it shares.
    """
    where, arrays = tensors.folder, tensors.arrays
    for marker in (".base_layer.", ".ln_tuning_layers."):
        for name in [n for n in arrays if marker in n]:
            plain = name.replace(marker, ".")
            if plain in arrays:
                raise InteropError(f"{where} holds both {PREFIX}{name} and {PREFIX}{plain}")
            arrays[plain] = arrays.pop(name)
    for name in sorted(_required(config, layout, flat, adapted)):
        if name not in arrays:
            raise InteropError(f"{where} lacks {PREFIX}{name}")
    of = {r.ours: r.names(weights.shape_of(flat[r.ours])) for r in layout.rules}
    rules = [r for r in layout.rules if any(name in arrays for name in of[r.ours])]
    if config.saved and not config.tie and layout.shares_table:
        table = layout.of_table().names[0]
        if peft_match.is_saved(config.saved, table):
            raise InteropError(f"{where} unties the output layer from {table.rpartition('.')[2]}; the base ties them "
                               "(tied=True)")  # fmt: skip
    # layers that the file leaves as they are keep our values
    partial = [r for r in rules if any(name not in arrays for name in of[r.ours])]
    source = written(partial, flat, layout.config) if partial else {}
    found = {name for r in rules for name in of[r.ours] if name in arrays}
    source |= {name: arrays.pop(name) for name in found}
    abstract = paths.nested((r.ours, _abstract(flat[r.ours])) for r in rules)
    is_padded = lambda path: path in pretrained.PADDED and getattr(layout.config, "vocab_pad_multiple", 1) > 1
    read = names.read_params(source, rules, abstract, lambda _: False, str(where), padded=is_padded) if rules else {}
    _check_copies(tensors, layout, source, flat)
    new = dict(paths.flatten(read))
    return {path: x if weights.is_node(flat[path]) else x.astype(flat[path].dtype) for path, x in new.items()}


def _abstract(w: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(weights.shape_of(w), jnp.float32)


def _check_copies(tensors: Tensors, layout: Layout, source: Mapping[str, np.ndarray], flat: Mapping[str, Any]) -> None:
    """Takes copies of tied tensors out of the file; they must equal what they are copies of."""
    copies = [n for n in tensors.arrays if n.endswith((".weight", ".bias"))]
    copies = [n for n in copies if layout.family.ignored(layout.config, n)]
    if not copies:
        return
    table = np.asarray(weights.materialize(flat[peft_names.TABLE]))[: layout.config.vocab_size]
    for name in copies:
        copy = tensors.arrays[name]
        new = [x for x in source.values() if x.shape == copy.shape]
        originals = new or [x for x in (table,) if x.shape == copy.shape]
        if originals and not any(np.array_equal(x, copy) for x in originals):
            raise InteropError(f"{tensors.folder} unties {PREFIX}{name} from the tensor that it shares with another "
                               "module; the base ties them (tied=True)")  # fmt: skip
        if originals:
            del tensors.arrays[name]
