"""PEFT's `adapter_config.json`: fields that are honoured, fields without effect on a stored adapter, and no others.

PEFT writes every field of its config classes, most of them switched off. A field that is in none of the tables below
must be off too: whatever it does, this library does not do it.

Source: peft 0.21's `tuners/*/config.py` and `tuners/lora/layer.py`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from llm_jax.interop.huggingface import peft_match
from llm_jax.interop.names import InteropError

# peft_type -> the fields that are read below
HONOURED: dict[str, frozenset[str]] = {
    "LORA": frozenset(
        """
        r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern use_dora lora_bias bias init_lora_weights
        target_modules exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices
        ensure_weight_tying task_type
        """.split()  # noqa: SIM905
    ),
    "IA3": frozenset(["target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "task_type"]),
    "LN_TUNING": frozenset(["target_modules", "exclude_modules", "modules_to_save", "task_type"]),
    "TRAINABLE_TOKENS": frozenset(["token_indices", "target_modules"]),
}
NEUTRAL = frozenset(
    [
        # where the adapter comes from and what it was made with
        *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"),
        # settings of initialisations and of variants that `ALLOWED` or being off decide about
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        # first values of what is stored
        *("init_ia3_weights", "init_weights"),
        # layout of GPT-2's kernels, which PEFT corrects by itself; Megatron's module; where PEFT computes
        *("fan_in_fan_out", "megatron_core", "runtime_config", "merge_weights"),
    ]
)
STARTS = ("pissa", "olora")  # PEFT changes the base when it loads them, and so does `peft_start`
# the values of a field that are honoured
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": tuple(HONOURED),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica", *STARTS),
}
OFF: tuple[Any, ...] = (None, False, [], {})
REMEDY = {
    "init_lora_weights": "; it changes the base; save it in PEFT with path_initial_model_for_weight_conversion",
    "layer_replication": "; it repeats layers of the base; merge it in PEFT first",
}

# head of a model -> PEFT's task, for which PEFT itself saves the modules of a head whole; other heads have none
TASKS = {
    "lm": "CAUSAL_LM",
    "none": "FEATURE_EXTRACTION",
    "classification": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "span": "QUESTION_ANS",
}
SAVED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

Names = str | tuple[str, ...] | None  # a regular expression, ends of names, or nothing


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` says.

    Attributes:
      kind: `peft_type`.
      targets: the adapted modules.
      exclude: modules that are not, whatever `targets` says.
      layers: the only layers whose modules are targets; None for all.
      layers_pattern: names before a layer's number.
      saved: ends of names of modules that are stored whole.
      rank: r of modules that `ranks` does not name.
      alpha: alpha of modules that `alphas` does not name.
      dropout: rate on the input of A.
      rs: alpha is divided by the root of r.
      ranks: patterns of names -> r.
      alphas: patterns of names -> alpha.
      dora: DoRA.
      lora_bias: B has a bias.
      bias: the biases of the base that are stored: `none`, `all`, `lora_only`.
      start: `pissa` or `olora`, else empty.
      tie: table and output layer share their adapter.
      feedforward: modules whose input IA3 scales.
      tokens: end of a table's name, or empty for the input's table -> numbers of its trained rows.
    """

    kind: str = "LORA"
    targets: Names = ()
    exclude: Names = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rs: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    start: str = ""
    tie: bool = False
    feedforward: Names = None
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks ranges."""
        for rank in (self.rank, *self.ranks.values()):
            if rank < 1:
                raise ValueError(f"rank={rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout={self.dropout} must lie in [0, 1)")
        if self.dora and self.lora_bias:
            raise ValueError("lora_bias: PEFT has none with use_dora")
        texts = [x for x in (self.targets, self.exclude, self.feedforward) if isinstance(x, str)]
        for text in (*texts, *self.saved, *self.ranks, *self.alphas, *self.layers_pattern):
            try:
                re.compile(text)
            except re.error as e:
                raise ValueError(f"{text!r}, which is not a regular expression: {e}") from e

    def rank_of(self, name: str) -> int:
        """Rank of a module."""
        return int(peft_match.value(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """Factor of a module's product A B."""
        rank = self.rank_of(name)
        return float(peft_match.value(self.alphas, name, self.alpha)) / (math.sqrt(rank) if self.rs else rank)


def _names(value: Any) -> Names:
    return value if isinstance(value, str) or value is None else tuple(map(str, value))


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    return (value,) if isinstance(value, int) else tuple(map(int, value))


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    by_name = value if isinstance(value, dict) else {"": value}
    return {name: tuple(map(int, ids)) for name, ids in by_name.items()}


def _parsed(raw: dict[str, Any]) -> AdapterConfig:
    kind, pattern = raw["peft_type"], raw.get("layers_pattern") or ()
    task, saved = raw.get("task_type"), raw.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise ValueError(f"modules_to_save={saved!r}, which is not a list")
    shared: dict[str, Any] = {"kind": kind, "exclude": _names(raw.get("exclude_modules"))}
    if kind == "TRAINABLE_TOKENS":
        targets = _names(raw.get("target_modules"))
        name = targets if isinstance(targets, str) else (targets or ("",))[0]
        if isinstance(targets, tuple) and len(targets) > 1:
            raise ValueError(f"target_modules={list(targets)} must name one table")
        return AdapterConfig(targets=targets, tokens=_tokens({name: raw["token_indices"]}), **shared)
    shared |= {"targets": _names(raw["target_modules"]), "saved": (*map(str, saved), *SAVED.get(str(task), ()))}
    if not shared["targets"] and kind != "LORA":
        raise ValueError(f"target_modules={raw['target_modules']!r} must name modules")
    if kind == "IA3":
        return AdapterConfig(feedforward=_names(raw.get("feedforward_modules")), **shared)
    if kind == "LN_TUNING":
        return AdapterConfig(**shared)
    start = raw.get("init_lora_weights")
    return AdapterConfig(
        layers=_layers(raw.get("layers_to_transform")),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        dropout=float(raw.get("lora_dropout") or 0.0),
        rs=bool(raw.get("use_rslora")),
        ranks={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
        alphas={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
        dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        bias=raw.get("bias") or "none",
        start=start if start in STARTS else "",
        tie=bool(raw.get("ensure_weight_tying")),
        tokens=_tokens(raw.get("trainable_token_indices")),
        **shared,
    )


def read(folder: epath.Path) -> AdapterConfig:
    """Reads a folder's `adapter_config.json`.

    Raises:
      InteropError: if it is missing or damaged, or naming a field that is missing, is not supported or would change
        what the adapter computes.
    """
    file = folder / "adapter_config.json"
    if not file.exists():
        raise InteropError(f"{folder} holds no PEFT adapter: adapter_config.json is missing")
    try:
        raw = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as e:
        raise InteropError(f"{file} is not an adapter config: {e}") from e
    kind = raw.get("peft_type")
    if kind not in tuple(HONOURED):  # which asks no hash of it
        raise InteropError(f"{file}: peft_type={kind!r} is not supported; there are {', '.join(HONOURED)}")
    for name in sorted(raw):
        allowed = ALLOWED.get(name)
        decided = allowed is None and (name in HONOURED[kind] or name in NEUTRAL)
        if not decided and raw[name] not in (OFF if allowed is None else (*allowed, None)):
            raise InteropError(f"{file}: {name}={raw[name]!r} is not supported{REMEDY.get(name, '')}")
    try:
        return _parsed(raw)
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise InteropError(f"{file} lacks or misstates {e}") from e


def write(folder: epath.Path, config: AdapterConfig, task: str | None, base: str, fan_in_fan_out: bool) -> None:
    """Writes `adapter_config.json`.

    Args:
      folder: where.
      config: what it says.
      task: PEFT's task, or None.
      base: name or path of the base model.
      fan_in_fan_out: whether the adapted kernels are `[in, out]` there.
    """
    listed = lambda names: names if isinstance(names, str) or names is None else list(names)
    fields: dict[str, Any] = {"peft_type": config.kind, "task_type": task, "base_model_name_or_path": base}
    fields |= {"target_modules": listed(config.targets), "inference_mode": True}
    tokens = {name: list(ids) for name, ids in config.tokens.items()}
    if config.kind == "TRAINABLE_TOKENS":
        fields["token_indices"] = next(iter(tokens.values()))
    else:
        fields["modules_to_save"] = list(config.saved) or None
    if config.kind == "IA3":
        fields |= {"feedforward_modules": listed(config.feedforward or ()), "fan_in_fan_out": fan_in_fan_out}
    if config.kind == "LORA":
        fields |= {
            "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rs,
            "bias": config.bias, "fan_in_fan_out": fan_in_fan_out, "rank_pattern": dict(config.ranks),
            "alpha_pattern": dict(config.alphas), "use_dora": config.dora, "lora_bias": config.lora_bias,
            "trainable_token_indices": tokens.get("", tokens) or None, "ensure_weight_tying": config.tie,
        }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
