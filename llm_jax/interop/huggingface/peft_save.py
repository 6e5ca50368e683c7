"""Writing PEFT's folders from the deltas of a model, and from what trained beside them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llm_jax.delta import node
from llm_jax.delta.lora import Lora, ranks_of
from llm_jax.delta.node import DeltaError
from llm_jax.interop.huggingface import peft_config, peft_fused, peft_lora, peft_match, peft_names, peft_vectors
from llm_jax.interop.huggingface.peft_config import AdapterConfig
from llm_jax.interop.huggingface.peft_names import PREFIX, Layout, Written, module_of
from llm_jax.interop.huggingface.peft_tensors import FILE
from llm_jax.interop.huggingface.peft_whole import written
from llm_jax.interop.names import InteropError, Rule, some
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.stack import stack
from llm_jax.storage.safetensors import save_file

_HEAD = ("classifier", "pooler")  # first parts of our paths of a head with labels
# the deltas of a weight, the outermost first -> PEFT's kind
KINDS = {
    ("Lora",): "LORA",
    ("Dora", "Lora"): "LORA",
    ("Biased", "Lora"): "LORA",
    ("Scaled",): "IA3",
    ("TokenRows",): "TRAINABLE_TOKENS",
}


def save(
    path: epath.PathLike,
    model: Model,
    params: Params,
    base: str = "",
    whole: Sequence[str] = (),
    original: Params | None = None,
) -> None:
    """Writes the deltas in `params` so that `peft.PeftModel.from_pretrained` reads them.

    PEFT's format holds LoRA or DoRA with biases and trained tokens beside them, or IA3, or trained tokens alone, or
    tuned norms alone. `load` gives back what is saved bit by bit, with two exceptions that round once: a bias beside
    LoRA (`Biased`) is divided by the scale, and parts of a fused layer whose scales differ get one scale.

    Args:
      path: folder.
      model: the module.
      params: stacked or unstacked.
      base: name or path of the base model.
      whole: patterns of parameters that trained beside the deltas. All biases, or those of the adapted modules, become
        PEFT's `bias`; norms alone become LayerNorm tuning; other modules are stored whole, as a head with labels and
        its pooler always are. LoRA on such a module is merged into it.
      original: the base before a start changed it (PiSSA, OLoRA). The adapter is then written against it, as
        plain LoRA of twice the rank: what the start took out is `original - base`, and becomes minus A0 B0.

    Raises:
      InteropError: if there is no delta, one has no place in PEFT's format or beside the others, a pattern matches
        nothing, a tied table is to be stored, or `original` differs from the base by more than rank r.
    """
    stacked = stack(realize(params))
    flat = dict(paths.flatten(stacked, weights.is_node))
    layout = peft_names.layout(model.config, flat)
    try:
        paths.select(sorted({*flat, *(p for tree in (params, stacked) for p, _ in paths.flatten(tree))}), whole)
        config, tensors, made = _content(layout, flat, tuple(whole), original)
    except InteropError:
        raise
    except (DeltaError, ValueError) as e:
        raise InteropError(str(e)) from e
    _write(epath.Path(path), config, tensors, layout, base, made)


def _content(
    layout: Layout, flat: Mapping[str, Any], whole: tuple[str, ...], original: Params | None
) -> tuple[AdapterConfig, dict[str, np.ndarray], Written | None]:
    """(what the config says, the tensors, what carries LoRA or IA3)."""
    homeless = sorted(flat.keys() - {r.ours for r in layout.rules})
    if homeless:
        raise InteropError(f"{some(homeless)} have no place in PEFT's format; merge or detach what was added first")
    is_chosen = paths.matcher(whole)
    chosen = [r for r in layout.rules if is_chosen(r.ours)]
    has_labels = any(r.ours.startswith("classifier/") for r in layout.rules)
    head = [r for r in layout.rules if has_labels and r.ours.split("/")[0] in _HEAD]
    biases = [r for r in chosen if r.theirs.endswith(".bias")]
    saved = _whole_modules(layout, [*head, *(r for r in chosen if r not in biases)])
    biases = [r for r in biases if r not in saved]
    deltas = _outside(flat, saved)
    bias = _bias(layout, biases, saved, deltas)
    if bias == "none" and biases:
        saved, biases = _whole_modules(layout, [*head, *chosen]), []
        deltas = _outside(flat, saved)
    kind = _kind(layout, flat, deltas, chosen)
    if original is not None and kind != "LORA":
        raise InteropError(f"original has no effect on {kind}: only LoRA starts out of the base")
    config, made = AdapterConfig(kind=kind, bias=bias), None
    adapted = {path: w for path, w in deltas.items() if KINDS[_names(w)] == kind != "TRAINABLE_TOKENS"}
    tensors: dict[str, np.ndarray] = {}
    if adapted:
        _check_places(adapted, layout)
        before = None if original is None else dict(paths.flatten(stack(original), weights.is_node))
        is_lora = kind == "LORA"
        made = peft_lora.write(layout, flat, adapted, before) if is_lora else peft_vectors.ia3(layout, flat, adapted)
        tensors |= made.tensors
        config = dataclasses.replace(config, **made.fields, targets=_targets(layout, made))
        for name, array in written(biases, flat, layout.config).items():
            module = module_of(name)
            tensors[f"{module}.base_layer.bias" if module in made.modules else name] = array
    if kind == "LN_TUNING":
        tuned = written([r for r in saved if r not in head], flat, layout.config)
        saved = head
        config = dataclasses.replace(
            config, targets=peft_names.ends(layout, sorted({module_of(name) for name in tuned}))
        )
        tensors |= {f"{module_of(n)}.ln_tuning_layers.{n.rpartition('.')[2]}": array for n, array in tuned.items()}
    tensors |= written(saved, _merged(flat, saved), layout.config)
    config = dataclasses.replace(config, saved=_saved_names(layout, flat, saved))
    config, rows = peft_vectors.rows(layout, config, {p: w for p, w in deltas.items() if _names(w) == ("TokenRows",)})
    return config, tensors | rows, made


def _write(
    folder: epath.Path,
    config: AdapterConfig,
    tensors: Mapping[str, np.ndarray],
    layout: Layout,
    base: str,
    made: Written | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {PREFIX + name: np.ascontiguousarray(array) for name, array in tensors.items()}
    parts = {} if made is None else made.parts
    metadata = {"format": "pt"} | ({peft_fused.METADATA: json.dumps(parts)} if parts else {})
    save_file(contents, str(folder / FILE), metadata=metadata)
    task = peft_config.TASKS.get(getattr(layout.config, "head", "lm"))
    if task == "CAUSAL_LM" and peft_names.has_copies(layout.config):
        task = "SEQ_2_SEQ_LM"
    peft_config.write(folder, config, task, base, made is not None and not made.transposed)


def _names(w: Any) -> tuple[str, ...]:
    return tuple("Lora" if isinstance(delta, Lora) else type(delta).__name__ for delta in node.layers_of(w))


def _whole_modules(layout: Layout, rules: Sequence[Rule]) -> list[Rule]:
    """All rules of the modules of some rules.

    Raises:
      InteropError: naming a parameter whose module cannot be stored whole.
    """
    output = peft_names.tied_output(layout.config)
    for rule in rules:
        module = module_of(rule.theirs)
        shared = f"{output}.".startswith(f"{module}.") or (layout.shares_table and rule.ours == peft_names.TABLE)
        if shared and rule.ours == peft_names.TABLE:
            raise InteropError("PEFT's format cannot store a table that the output layer shares: train it without LoRA")
        if shared or not module:
            reason = "it is in no module there" if not module else f"{module} shares the token table"
            raise InteropError(f"{rule.ours} has no place in PEFT's format: {reason}")
    modules = tuple(f"{module_of(r.theirs)}." for r in rules)
    return [r for r in layout.rules if modules and r.theirs.startswith(modules)]


def _outside(flat: Mapping[str, Any], saved: Sequence[Rule]) -> dict[str, Any]:
    whole = {r.ours for r in saved}
    return {path: w for path, w in flat.items() if node.is_delta(w) and path not in whole}


def _bias(layout: Layout, biases: Sequence[Rule], saved: Sequence[Rule], deltas: Mapping[str, Any]) -> str:
    """PEFT's `bias` that stands for some trained biases beside LoRA; `none` where none does."""
    loras = {path: lora for path, w in deltas.items() if (lora := peft_lora.lora_of(w)) is not None}
    wanted = {r.theirs for r in biases}
    if not loras or not wanted or any(r.theirs in wanted and r not in biases for r in layout.rules):
        return "none"
    every = {r.theirs for r in layout.rules if r.theirs.endswith(".bias") and r not in saved}
    if wanted == every:
        return "all"
    in_all_layers = all(0 not in (ranks_of(lora) or ()) for lora in loras.values())
    adapted = {f"{module_of(r.theirs)}.bias" for r in layout.rules if r.ours in loras} & every
    return "lora_only" if in_all_layers and wanted == adapted else "none"


def _kind(layout: Layout, flat: Mapping[str, Any], deltas: Mapping[str, Any], chosen: Sequence[Rule]) -> str:
    """PEFT's `peft_type`.

    Raises:
      InteropError: naming what has no place.
    """
    for path, w in deltas.items():
        if _names(w) not in KINDS:
            names = " around ".join(delta.name for delta in node.layers_of(w))
            raise InteropError(f"{names} on {path} has no place in PEFT's format")
    kinds = {KINDS[_names(w)]: path for path, w in deltas.items()}
    if "IA3" in kinds and len(kinds) > 1:
        other = next(path for kind, path in kinds.items() if kind != "IA3")
        raise InteropError(
            f"IA3 on {kinds['IA3']} beside {deltas[other].name} on {other} has no place in PEFT's format"
        )
    if kinds.keys() & {"LORA", "IA3"}:
        return "IA3" if "IA3" in kinds else "LORA"
    if kinds:
        beside = [r.ours for r in chosen] + [r.ours for r in layout.rules if r.ours.startswith("classifier/")]
        if beside:
            raise InteropError(f"trained token rows beside {some(beside)} need LoRA in PEFT's format")
        return "TRAINABLE_TOKENS"
    if any(node.is_delta(w) for w in flat.values()):
        raise InteropError("all modules with LoRA are stored whole: save the merged model instead")
    beside = [r.ours for r in chosen if r.ours.split("/")[0] not in _HEAD]
    if not beside:
        raise InteropError("there is no LoRA or other delta in these parameters, and whole names no norm")
    others = [path for path in beside if not path.rpartition("/")[0].endswith("norm")]
    if others:
        raise InteropError(f"{some(others)} have no place in PEFT's format without LoRA beside them")
    return "LN_TUNING"


def _check_places(adapted: Mapping[str, Any], layout: Layout) -> None:
    homeless = sorted(adapted.keys() - {path for site in layout.sites for path in site.kernels})
    if homeless:
        name = adapted[homeless[0]].name
        raise InteropError(
            f"{name} on {some(homeless)} has no place in PEFT's format: that is not a linear layer there"
        )


def _targets(layout: Layout, made: Written) -> tuple[str, ...]:
    """Shortest names of the adapted modules, where IA3 scales inputs apart from the others."""
    inner = [m for m in made.modules if peft_match.is_named(made.fields.get("feedforward"), m)]
    outer = [m for m in made.modules if m not in inner]
    return tuple(sorted({*peft_names.ends(layout, outer), *(made.fields.get("feedforward") or ())}))


def _merged(flat: Mapping[str, Any], saved: Sequence[Rule]) -> dict[str, Any]:
    """The parameters with the deltas of whole modules folded in."""
    out = dict(flat)
    for path in (r.ours for r in saved):
        if node.is_delta(flat[path]):
            bias = f"{path.removesuffix('kernel')}bias"
            out[path], folded = node.folded(flat[path], flat.get(bias))
            out |= {} if folded is None else {bias: folded}
    return out


def _saved_names(layout: Layout, flat: Mapping[str, Any], saved: Sequence[Rule]) -> tuple[str, ...]:
    """Shortest names that PEFT stores these modules under, and no others."""
    found = [module_of(name) for rule in saved for name in rule.names(weights.shape_of(flat[rule.ours]))]
    # RoBERTa's head is one module of two layers, which PEFT stores by itself
    found = list(dict.fromkeys("classifier" if m.startswith("classifier.") else m for m in found))
    tops = [m for m in found if not any(m.startswith(f"{other}.") for other in found)]
    others = {m for m in layout.modules if not any(m == top or m.startswith(f"{top}.") for top in tops)}
    return tuple(peft_match.shortest(tops, others, peft_match.is_tail))
