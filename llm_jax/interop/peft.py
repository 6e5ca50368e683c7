"""LoRA in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.interop import llama
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import stack
from llm_jax.storage.safetensors import TensorFolder, save_file

_PREFIX = "base_model.model."


def _rules(config: Any) -> list[Rule]:
    if not isinstance(config, LlamaConfig):
        raise InteropError("PEFT files are supported for the Llama family; GPT-2's fused projections have no match")
    return [r for r in llama.rules(config) if r.ours.endswith("kernel")]


def save(path: epath.PathLike, model: Any, params: Any, base: str = "") -> None:
    """Writes the LoRA in `params` (not the base) so that `peft.PeftModel.from_pretrained` reads it.

    Raises:
      InteropError: if there is no LoRA, or its nodes differ in rank or scale.
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
    tensors, modules = {}, set()
    for rule in _rules(model.config):
        if rule.ours not in nodes:
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
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    settings_json = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": scale * rank, "lora_dropout": dropout, "use_rslora": False, "bias": "none",
        "fan_in_fan_out": False, "target_modules": sorted(modules), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings_json, indent=2) + "\n")


def load(path: epath.PathLike, model: Any, params: Any) -> Any:
    """Attaches the LoRA of a PEFT folder to `params`.

    Raises:
      InteropError: on another kind of adapter, a tensor without a home, or a wrong shape.
    """
    folder = epath.Path(path)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise InteropError(f"{folder} holds no PEFT adapter: adapter_config.json is missing")
    try:
        raw = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise InteropError(f"{file} is no adapter config: {e}") from e
    if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("bias", "none") != "none":
        raise InteropError(f"{file}: only plain LoRA (no DoRA, no biases) is supported, not {raw.get('peft_type')}")
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        raise InteropError(f"{file}: rank_pattern and alpha_pattern are not supported")
    try:
        config = LoraConfig(rank=raw["r"], alpha=float(raw["lora_alpha"]), rs=bool(raw.get("use_rslora")))
    except (KeyError, ValueError, TypeError) as e:
        raise InteropError(f"{file} lacks or misstates {e}") from e
    source = TensorFolder(folder)
    params, used = stack(params), set()
    for rule in _rules(model.config):
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
        node = Lora(w, a, b, config.scale, float(raw.get("lora_dropout", 0.0)))
        params = weights.replace(params, rule.ours, lambda _, __, node=node: node)
    extra = sorted(set(source) - used)
    if extra:
        raise InteropError(f"{folder} holds tensors without a home: {extra[:3]}")
    return params
