"""LoRA in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways.

A and B of a kernel are two tensors like any other, so rules say where they are. Other parameters that train beside
LoRA, such as a head with labels, are stored whole, module by module (PEFT's `modules_to_save`).
"""

from collections.abc import Mapping, Sequence

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
from llm_jax.nn.protocols import Model, ModelConfig, Params
from llm_jax.nn.stack import stack
from llm_jax.storage.safetensors import TensorFolder, save_file

FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LABELS = "classifier/*"  # our parameters of a head with labels
_TABLES = ("embed/embedding", "head/kernel")  # their rows may be padded here


def _rules(config: ModelConfig) -> list[Rule]:
    if not isinstance(config, LlamaConfig):
        raise InteropError("PEFT files are supported for the Llama family; GPT-2's fused projections have no match")
    return llama.rules(config)


def _matrices(rule: Rule) -> tuple[Rule, Rule]:
    """Where A and B of a kernel are: `[r, in]` and `[out, r]` there."""
    module = _module(rule)
    a = Rule(f"{rule.ours}/a", f"{module}.lora_A.weight", transposed=True)
    return a, Rule(f"{rule.ours}/b", f"{module}.lora_B.weight", transposed=True)


def _module(rule: Rule) -> str:
    return rule.theirs.rpartition(".")[0]


def _last_parts(rules: Sequence[Rule]) -> list[str]:
    return sorted({_module(rule).rpartition(".")[2] for rule in rules})


def save(path: epath.PathLike, model: Model, params: Params, base: str = "", whole: Sequence[str] = ()) -> None:
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
    flat = dict(paths.flatten(stack(params), weights.is_node))
    nodes = {path: w for path, w in flat.items() if isinstance(w, Lora)}
    if not nodes:
        raise InteropError("there is no LoRA in these parameters")
    settings = {(w.a.shape[-1], w.scale, w.dropout) for w in nodes.values()}
    if len(settings) > 1:
        raise InteropError(f"LoRA nodes differ in (rank, scale, dropout): {sorted(settings)}")
    rules = [r for r in _rules(model.config) if r.ours in flat]
    is_chosen = paths.matcher((_LABELS, *whole))
    modules = {_module(r) for r in rules if is_chosen(r.ours)}
    saved = [r for r in rules if _module(r) in modules]
    tensors = {r.ours: flat[r.ours] for r in saved}
    if model.config.tied and "embed/embedding" in tensors:
        raise InteropError("PEFT's format cannot store a table that the output layer shares: train it without LoRA")
    adapted = [r for r in rules if r.ours in nodes.keys() - tensors.keys() and r.ours.endswith("kernel")]
    homeless = sorted(nodes.keys() - tensors.keys() - {r.ours for r in adapted})
    if homeless:
        raise InteropError(f"LoRA on {homeless[:3]} has no place in PEFT's format")
    if not adapted:
        raise InteropError("all modules with LoRA are stored whole: save the merged model instead")
    for rule in adapted:
        node = nodes[rule.ours]
        tensors |= {f"{rule.ours}/a": np.asarray(node.a), f"{rule.ours}/b": np.asarray(node.b)}
    all_rules = [*saved, *(matrix for rule in adapted for matrix in _matrices(rule))]
    rows = dict.fromkeys(_TABLES, model.config.vocab_size)
    written = names.write_params(paths.nested(tensors.items()), all_rules, rows, jnp.float32)
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {_PREFIX + name: np.ascontiguousarray(array) for name, array in written}
    save_file(contents, str(folder / FILE), metadata={"format": "pt"})
    rank, scale, dropout = settings.pop()
    config = LoraConfig(rank=rank, alpha=scale * rank, dropout=dropout)
    peft_config.write(folder, config, model.config.head, _last_parts(adapted), _last_parts(saved), base)


def load(path: epath.PathLike, model: Model, params: Params) -> Params:
    """Attaches the LoRA of a PEFT folder to `params`, and replaces the modules that the folder holds whole.

    Raises:
      InteropError: on another kind of adapter, a field or a tensor without a home, or a wrong shape.
    """
    folder = epath.Path(path)
    lora, saved = peft_config.read(folder)
    stored = TensorFolder(folder / FILE if (folder / FILE).exists() else folder)
    source = {name.removeprefix(_PREFIX): stored[name] for name in stored}
    flat = dict(paths.flatten(stack(params), weights.is_node))
    rules = [r for r in _rules(model.config) if r.ours in flat]

    def names_of(rule: Rule) -> list[str]:
        return rule.names(weights.shape_of(flat[rule.ours.removesuffix("/a").removesuffix("/b")]))

    is_saved = {r.ours: any(part in saved for part in r.theirs.split(".")) for r in rules}
    if model.config.tied and is_saved["embed/embedding"]:
        raise InteropError(f"{folder} unties the output layer from embed_tokens; the base ties them (tied=True)")
    whole = [r for r in rules if is_saved[r.ours] or any(name in source for name in names_of(r))]
    kernels = [r for r in rules if r.ours.endswith("kernel") and r not in whole]
    adapted = [r for r in kernels if any(name in source for name in names_of(_matrices(r)[0]))]
    shapes = {r.ours: weights.shape_of(flat[r.ours]) for r in whole}
    for rule in adapted:
        w = flat[rule.ours]
        if isinstance(w, Lora):
            raise InteropError(f"{rule.ours} carries LoRA already; merge or detach it first")
        *lead, fan_in, fan_out = weights.shape_of(w)
        for matrix, shape in zip(_matrices(rule), ((fan_in, lora.rank), (lora.rank, fan_out)), strict=True):
            _check_matrix(folder, source, matrix, names_of(matrix), shape)
            shapes[matrix.ours] = (*lead, *shape)
    all_rules = [*whole, *(matrix for rule in adapted for matrix in _matrices(rule))]
    _check_homes(folder, model.config, source, {name for rule in all_rules for name in names_of(rule)})
    abstract = paths.nested((path, jax.ShapeDtypeStruct(shape, jnp.float32)) for path, shape in shapes.items())
    is_padded = lambda path: model.config.vocab_pad_multiple > 1 and path in _TABLES
    read = names.read_params(source, all_rules, abstract, lambda _: False, str(folder), padded=is_padded)
    new = dict(paths.flatten(read))
    for path in (r.ours for r in adapted):
        flat[path] = Lora(flat[path], new[f"{path}/a"], new[f"{path}/b"], lora.scale, lora.dropout)
    for path in (r.ours for r in whole):
        flat[path] = new[path] if weights.is_node(flat[path]) else new[path].astype(flat[path].dtype)
    return paths.nested(flat.items())


def _check_matrix(
    folder: epath.Path, source: Mapping[str, np.ndarray], rule: Rule, wanted: Sequence[str], shape: tuple[int, int]
) -> None:
    """Refuses a matrix that some layers lack, or of another rank or base."""
    missing = [name for name in wanted if name not in source]
    if missing and rule.ours.endswith("/a"):
        layers = [layer for layer, name in enumerate(wanted) if name in source]
        raise InteropError(f"{folder}: {_module(rule).removesuffix('.lora_A')} is adapted in layers {layers} only; "
                           "all or none is supported")  # fmt: skip
    if missing:
        raise InteropError(f"{folder} lacks {_PREFIX}{missing[0]}")
    for name in wanted:
        if source[name].shape != shape[::-1]:
            stored = list(source[name].shape)
            raise InteropError(f"{folder}: {_PREFIX}{name} has shape {stored}, expected {list(shape[::-1])}")


def _check_homes(folder: epath.Path, config: LlamaConfig, source: Mapping[str, np.ndarray], wanted: set[str]) -> None:
    extra = sorted(source.keys() - wanted)
    if extra:
        is_head = any(n.split(".")[-2] in ("score", "classifier", "qa_outputs") for n in extra if "." in n)
        remedy = f"; the base has head={config.head!r}: load it with another head" if is_head else ""
        raise InteropError(f"{folder} holds tensors without a home: {[_PREFIX + n for n in extra[:3]]}{remedy}")
