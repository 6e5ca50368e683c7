"""LoRA in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways.

What trains beside LoRA, as a head with labels does, is stored whole, module by module (PEFT's `modules_to_save`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.interop import names
from llm_jax.interop.huggingface import llama, peft_config
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import stack
from llm_jax.storage.safetensors import TensorFolder, save_file

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LABELS = "classifier/*"  # our parameters of a head with labels
_TABLES = ("embed/embedding", "head/kernel")  # their rows may be padded here


def _rules(config: Any) -> list[Rule]:
    if not isinstance(config, LlamaConfig):
        raise InteropError("PEFT files are supported for the Llama family; GPT-2's fused projections have no match")
    return llama.rules(config)


def save(path: epath.PathLike, model: Any, params: Any, base: str = "", whole: Sequence[str] = ()) -> None:
    """Writes the LoRA in `params` so that `peft.PeftModel.from_pretrained` reads it.

    Args:
      path: folder.
      model: the module.
      params: stacked or unstacked.
      base: name or path of the base model.
      whole: patterns of parameters that trained beside LoRA. Their modules are stored whole, as a head with labels
        always is; LoRA on such a module is merged into it.

    Raises:
      InteropError: if there is no LoRA, its nodes differ in rank or scale, or a tied table is to be stored.
    """
    params = stack(params)
    is_lora = lambda x: isinstance(x, Lora)
    nodes = {p: w for p, w in paths.flatten(params, is_lora) if is_lora(w)}
    if not nodes:
        raise InteropError("there is no LoRA in these parameters")
    settings = {(w.a.shape[-1], w.scale, w.dropout) for w in nodes.values()}
    if len(settings) > 1:
        raise InteropError(f"LoRA nodes differ in (rank, scale, dropout): {sorted(settings)}")
    rank, scale, dropout = settings.pop()
    rules, flat = _rules(model.config), dict(paths.flatten(params, weights.is_node))
    module_of = lambda rule: rule.theirs.rpartition(".")[0]
    chosen = {module_of(r) for r in rules if r.ours in flat and paths.matcher((_LABELS, *whole))(r.ours)}
    stored = {r.ours: flat[r.ours] for r in rules if r.ours in flat and module_of(r) in chosen}
    if model.config.tied and "embed/embedding" in stored:
        raise InteropError("PEFT's format cannot store a table that the output layer shares: train it without LoRA")
    rows = dict.fromkeys(_TABLES, model.config.vocab_size)
    written = names.write_params(paths.nested(stored.items()), rules, rows, jnp.float32)
    tensors = {_PREFIX + name: np.ascontiguousarray(array) for name, array in written}
    nodes = {p: w for p, w in nodes.items() if p not in stored}
    modules: set[str] = set()
    for rule in rules:
        if rule.ours not in nodes or not rule.ours.endswith("kernel"):
            continue
        node, name = nodes.pop(rule.ours), rule.theirs.removesuffix(".weight")
        modules.add(name.rpartition(".")[2])
        a, b = np.asarray(node.a, np.float32), np.asarray(node.b, np.float32)
        for layer in range(len(a)) if "{l}" in name else [None]:
            where, pick = _PREFIX + name.format(l=layer), () if layer is None else layer
            tensors[f"{where}.lora_A.weight"] = np.ascontiguousarray(a[pick].T)
            tensors[f"{where}.lora_B.weight"] = np.ascontiguousarray(b[pick].T)
    if nodes:
        raise InteropError(f"LoRA on {sorted(nodes)[:3]} has no place in PEFT's format")
    if not modules:
        raise InteropError("all modules with LoRA are stored whole: save the merged model instead")
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / FILE), metadata={"format": "pt"})
    settings_of = LoraConfig(rank=rank, alpha=scale * rank, dropout=dropout)
    saved = sorted({name.rpartition(".")[2] for name in chosen})
    peft_config.write(folder, settings_of, model.config.head, sorted(modules), saved, base)


def load(path: epath.PathLike, model: Any, params: Any) -> Any:
    """Attaches the LoRA of a PEFT folder to `params`, and puts in the modules that the folder holds whole.

    Raises:
      InteropError: on another kind of adapter, a field or a tensor without a home, or a wrong shape.
    """
    folder = epath.Path(path)
    config, saved = peft_config.read(folder)
    rules = _rules(model.config)
    source = TensorFolder(folder / FILE if (folder / FILE).exists() else folder)
    params, used = stack(params), set()
    for rule in rules:
        if not rule.ours.endswith("kernel"):
            continue
        name = rule.theirs.removesuffix(".weight")
        pattern = re.compile(re.escape(_PREFIX + name).replace(re.escape("{l}"), r"(\d+)") + r"\.lora_A\.weight")
        found = sorted(int(m.group(1)) if m.groups() else 0 for m in map(pattern.fullmatch, source) if m)
        if not found:
            continue
        layers: Sequence[int | None] = found if "{l}" in name else [None]
        w = dict(paths.flatten(params, weights.is_node))[rule.ours]
        if isinstance(w, Lora):
            raise InteropError(f"{rule.ours} carries LoRA already; merge or detach it first")
        if "{l}" in name and found != list(range(w.shape[0])):
            raise InteropError(f"{folder}: {name} is adapted in layers {found} only; all or none is supported")
        sides = []
        for side in ("A", "B"):
            keys = [f"{_PREFIX}{name.format(l=i)}.lora_{side}.weight" for i in layers]
            if any(k not in source for k in keys):
                raise InteropError(f"{folder} lacks {next(k for k in keys if k not in source)}")
            used |= set(keys)
            want = (config.rank, w.shape[-2]) if side == "A" else (w.shape[-1], config.rank)
            for k in keys:
                if source[k].shape != want:
                    raise InteropError(f"{folder}: {k} has shape {list(source[k].shape)}, expected {list(want)}")
            arrays = [source[k].T for k in keys]
            sides.append(jnp.asarray(np.stack(arrays) if "{l}" in name else np.array(arrays[0])))
        a, b = sides
        node = Lora(w, a, b, config.scale, config.dropout)
        params = weights.replace(params, rule.ours, lambda _, __, node=node: node)
    rest = {name.removeprefix(_PREFIX): source[name] for name in source if name not in used}
    return _put_whole(folder, model.config, params, rest, saved, rules)


def _put_whole(
    folder: epath.Path,
    config: Any,
    params: Any,
    rest: Mapping[str, np.ndarray],
    saved: Sequence[str],
    rules: Sequence[Rule],
) -> Any:
    """Replaces the parameters that are stored whole: those of `saved` modules, and any other that is there."""
    is_saved = lambda rule: any(part in saved for part in rule.theirs.split("."))
    pattern = lambda rule: re.compile(re.escape(rule.theirs).replace(re.escape("{l}"), r"\d+"))
    there = dict(paths.flatten(params, weights.is_node))
    here = [r for r in rules if r.ours in there]
    chosen = [r for r in here if is_saved(r) or any(map(pattern(r).fullmatch, rest))]
    if config.tied and any(is_saved(r) for r in chosen if r.ours == "embed/embedding"):
        raise InteropError(f"{folder} unties the output layer from embed_tokens; the base ties them (tied=True)")
    wanted = {r.ours: there[r.ours] for r in chosen}
    extra = sorted(n for n in rest if not any(pattern(r).fullmatch(n) for r in chosen))
    if extra:
        is_head = any(n.split(".")[-2] in ("score", "classifier", "qa_outputs") for n in extra if "." in n)
        remedy = f"; the base has head={config.head!r}: load it with another head" if is_head else ""
        raise InteropError(f"{folder} holds tensors without a home: {[_PREFIX + n for n in extra[:3]]}{remedy}")
    shapes = paths.nested((p, jax.ShapeDtypeStruct(weights.shape_of(w), jnp.float32)) for p, w in wanted.items())
    padded = lambda path: config.vocab_pad_multiple > 1 and path in _TABLES
    read = names.read_params(rest, rules, shapes, lambda _: False, str(folder), padded=padded)
    whole = dict(paths.flatten(read))
    for path, w in wanted.items():
        new = whole[path] if weights.is_node(w) else whole[path].astype(w.dtype)
        params = weights.replace(params, path, lambda _, __, new=new: new)
    return params
