"""Reading PEFT's folders: deltas around the kernels of a model, and parameters instead of its own."""

import dataclasses
import re
from typing import Any

from etils import epath

from llm_jax.interop.huggingface import peft_config, peft_match, peft_names, peft_nodes
from llm_jax.interop.huggingface.peft_config import AdapterConfig
from llm_jax.interop.huggingface.peft_names import PREFIX, Layout, Site
from llm_jax.interop.huggingface.peft_tensors import Tensors
from llm_jax.interop.huggingface.peft_whole import read_whole
from llm_jax.interop.names import InteropError, some
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Model, Params
from llm_jax.nn.stack import stack

# what stands behind the name of a module
_SUFFIX = re.compile(
    r"\.(lora_[AB]\.\w+|lora_embedding_[AB]|lora_magnitude_vector|ia3_l"
    r"|(base_layer|ln_tuning_layers|modules_to_save|original_module)\.\w+|\w+)$"
)
ALL_LINEAR = "all-linear"
_OUTPUT = ("head/kernel", "head/output/kernel")


def load(path: epath.PathLike, model: Model, params: Params) -> Params:
    """Attaches a PEFT adapter to the parameters of its base.

    LoRA, rsLoRA and DoRA (also of some layers, or with ranks and scales of their own), IA3, LayerNorm tuning and
    trained tokens are read for every family; so are biases and modules that are stored whole, such as a head with
    labels. PiSSA and OLoRA change the base as PEFT does.

    Args:
      path: folder of `adapter_config.json` and `adapter_model.safetensors`.
      model: the base, with the head that the adapter has.
      params: its parameters, stacked or unstacked; kernels may be quantized.

    Returns:
      The parameters, stacked.

    Raises:
      InteropError: for another kind of adapter, a field that is not supported, and a tensor that is missing, without a
        home, not finite or of another base.
    """
    folder = epath.Path(path)
    config = peft_config.read(folder)
    tensors = Tensors(folder)
    flat = dict(paths.flatten(stack(params), weights.is_node))
    layout = peft_names.layout(model.config, flat)
    if config.targets == ALL_LINEAR:
        config = dataclasses.replace(config, targets=_linear(layout))
    _check_homes(tensors, layout)
    _check_targets(folder, config, layout)
    _read_past(tensors, config)
    adapted = _adapted(folder, config, layout, flat)
    flat |= read_whole(tensors, config, layout, flat, [site.names[i] for site, layers in adapted for i in layers])
    build = peft_nodes.ia3 if config.kind == "IA3" else peft_nodes.lora
    for site, layers in adapted:
        flat |= build(tensors, config, layout, flat, site, layers)
    flat |= peft_nodes.rows(tensors, config, layout, flat)
    if tensors.arrays:
        raise InteropError(_homeless(folder, model.config, sorted(tensors.arrays)))
    return paths.nested(flat.items())


def _linear(layout: Layout) -> tuple[str, ...]:
    """The modules that PEFT's `all-linear` names: every linear layer but the output layer."""
    sites = [site for site in layout.sites if not site.is_table and site.kernels[0] not in _OUTPUT]
    return tuple(name for site in sites for name in site.names)


def _adapted(
    folder: epath.Path, config: AdapterConfig, layout: Layout, flat: dict[str, Any]
) -> list[tuple[Site, list[int]]]:
    """The sites that carry LoRA or IA3, and their layers that do."""
    if config.kind not in ("LORA", "IA3"):
        return []
    found = []
    for site in layout.sites:
        layers = [i for i, name in enumerate(site.names) if peft_match.is_target(config, name)]
        if layers:
            peft_nodes.check_bare(folder, site, flat)
            found.append((site, layers))
    if config.targets and not found:
        raise InteropError(f"{folder}: target_modules={config.targets!r} with the other fields leaves no linear layer")
    return found


def _homeless(folder: epath.Path, config: Any, left: list[str]) -> str:
    is_head = any(part in ("score", "classifier", "qa_outputs") for name in left for part in name.split("."))
    remedy = f"; the base has head={config.head!r}: load it with another head" if is_head else ""
    output = peft_names.tied_output(config)
    if output is not None and any(name.startswith(output) for name in left):
        remedy = f"; the base ties {output} to its table, which carries no adapter of its own here"
    return f"{folder} holds tensors without a home: {some([PREFIX + name for name in left])}{remedy}"


def _check_homes(tensors: Tensors, layout: Layout) -> None:
    """Refuses tensors of modules that this model does not have, before anything is said to be missing."""
    unknown = [
        name
        for name in tensors.arrays
        if _SUFFIX.sub("", name) not in layout.modules
        and not name.endswith(".trainable_tokens_delta")
        and not layout.family.ignored(layout.config, name)
    ]
    if unknown:
        raise InteropError(_homeless(tensors.folder, layout.config, sorted(unknown)))


def _check_targets(folder: epath.Path, config: AdapterConfig, layout: Layout) -> None:
    """Refuses a target that no module has."""
    targets = config.targets
    if config.kind == "TRAINABLE_TOKENS":
        return  # names a table, which is looked for there
    for names in (targets,) if isinstance(targets, str) else [(end,) for end in targets or ()]:
        if not any(peft_match.is_named(names, module) for module in layout.modules):
            text = names if isinstance(names, str) else names[0]
            raise InteropError(f"{folder}: target_modules names {text!r}, which is not a module of this model")


def _read_past(tensors: Tensors, config: AdapterConfig) -> None:
    """With `bias="all"`, PEFT stores the biases of modules that it stores whole twice more, under odd names."""
    if config.bias == "all":
        odd = [n for n in tensors.arrays if n.endswith((".modules_to_save.bias", ".original_module.bias"))]
        for name in odd:
            del tensors.arrays[name]
