"""PEFT's `adapter_config.json`: fields that are honoured, fields without effect on a stored adapter, and no others.

PEFT writes every field of its `LoraConfig`, most of them switched off. A field that is in none of the tables below
must be off too: whatever it does, this library does not do it.

Source: peft's `tuners/lora/config.py` and `tuners/lora/layer.py`.
"""

import json
from typing import Any, NamedTuple

from etils import epath

from llm_jax.delta.lora import LoraConfig
from llm_jax.interop.names import InteropError

HONOURED = frozenset(["r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save"])
NEUTRAL = frozenset(
    [
        # where the adapter comes from, what it was made with, and for which class
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        # which modules carry matrices: the stored tensors say that
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # settings of initialisations and of variants that `ALLOWED` or being off decide about
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        # layout of GPT-2's kernels, which PEFT corrects by itself; Megatron's module; where PEFT computes
        *("fan_in_fan_out", "megatron_core", "runtime_config", "merge_weights"),
    ]
)
# the values that leave base, A and B as they are stored; other initialisations change the base when PEFT loads them
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
OFF: tuple[Any, ...] = (None, False, [], {})
REMEDY = {
    "init_lora_weights": "it changes the base; save it in PEFT with path_initial_model_for_weight_conversion",
    "layer_replication": "it repeats layers of the base; merge it in PEFT first",
}

# head of a model -> PEFT's task, for which PEFT itself saves the modules of a head whole
TASKS = {
    "lm": "CAUSAL_LM",
    "none": "FEATURE_EXTRACTION",
    "classification": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}


class AdapterConfig(NamedTuple):
    """What an `adapter_config.json` says.

    Attributes:
      lora: rank, scale and dropout.
      saved: modules that are stored whole beside the matrices, by the last part of their names.
    """

    lora: LoraConfig
    saved: tuple[str, ...]


def read(folder: epath.Path) -> AdapterConfig:
    """Reads a folder's `adapter_config.json`.

    Raises:
      InteropError: if it is missing or damaged, or naming a field that would change what the adapter computes.
    """
    file = folder / "adapter_config.json"
    if not file.exists():
        raise InteropError(f"{folder} holds no PEFT adapter: adapter_config.json is missing")
    try:
        raw = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise InteropError(f"{file} is not an adapter config: {e}") from e
    if raw.get("peft_type") != "LORA":
        raise InteropError(f"{file}: only plain LoRA (no DoRA, no biases) is supported, not {raw.get('peft_type')}")
    if raw.get("rank_pattern") or raw.get("alpha_pattern"):
        raise InteropError(f"{file}: rank_pattern and alpha_pattern are not supported")
    for name in sorted(raw.keys() - HONOURED - NEUTRAL):
        if raw[name] not in ALLOWED.get(name, OFF):
            remedy = f": {REMEDY[name]}" if name in REMEDY else ""
            raise InteropError(f"{file}: {name}={raw[name]!r} is not supported, only plain LoRA is{remedy}")
    try:
        rank, alpha, rs = raw["r"], float(raw["lora_alpha"]), bool(raw.get("use_rslora"))
        lora = LoraConfig(rank=rank, alpha=alpha, rs=rs, dropout=float(raw.get("lora_dropout") or 0.0))
        return AdapterConfig(lora, tuple(raw.get("modules_to_save") or ()))
    except (KeyError, ValueError, TypeError) as e:
        raise InteropError(f"{file} lacks or misstates {e}") from e


def write(folder: epath.Path, lora: LoraConfig, head: str, modules: list[str], saved: list[str], base: str) -> None:
    """Writes `adapter_config.json`.

    Args:
      folder: where.
      lora: rank, scale and dropout; PEFT divides alpha by the rank.
      head: of the model.
      modules: last parts of the names of all modules that carry matrices.
      saved: last parts of the names of all modules that are stored whole.
      base: name or path of the base model.
    """
    fields = {
        "peft_type": "LORA", "task_type": TASKS[head], "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rs, "bias": "none",
        "fan_in_fan_out": False, "target_modules": modules, "modules_to_save": saved or None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
