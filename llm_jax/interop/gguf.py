"""GGUF files of the Llama family: config, names, rotary layout.

GGUF's `llama` architecture stores query and key rows so that rotary pairs are neighbours; ours (and Hugging Face's)
pairs dimension i with i + H/2. The rows are put back on reading.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.interop.gguf_tokenizer import tokenizer_of as tokenizer_of
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.positions import RotaryScaling, rotary_frequencies
from llm_jax.storage.gguf import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def _check_kind(metadata: Mapping[str, Any]) -> None:
    """Refuses files that are not a model of a supported architecture.

    Raises:
      InteropError: naming what the file holds instead.
    """
    kind, content = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if content != "model":
        form = f" ({metadata['adapter.type']})" if "adapter.type" in metadata else ""
        raise InteropError(
            f"this GGUF holds no model but general.type={content!r}{form}: give the file of the model; llama.cpp's "
            "export-lora merges an adapter into it"
        )
    if metadata.get("split.count", 1) > 1:
        raise InteropError(
            f"this GGUF is file {metadata.get('split.no', 0) + 1} of a model split over several files, "
            f"{metadata['split.count']} in all: merge them with llama.cpp's gguf-split --merge"
        )
    if kind not in ARCHITECTURES:
        raise InteropError(f"GGUF architecture {kind!r} is not supported; there are {', '.join(ARCHITECTURES)}")
    experts = metadata.get(f"{kind}.expert_count", 0)
    if experts:
        raise InteropError(
            f"this GGUF holds a mixture of experts, {kind}.expert_count={experts}; only dense models are supported"
        )


def config_of(file: GgufFile) -> LlamaConfig:
    """The model's config from the metadata.

    Raises:
      InteropError: if the architecture or its scaling is not supported, or an entry is missing.
    """
    m = file.metadata
    _check_kind(m)
    kind = m["general.architecture"]

    def get(name: str, default: Any) -> Any:
        value = m.get(f"{kind}.{name}", default)
        if not isinstance(value, list):
            return value
        if not value or any(v != value[0] for v in value):  # one number a layer
            raise InteropError(f"the GGUF gives layers different {kind}.{name}: {value}; only equal ones are supported")
        return value[0]

    def need(name: str) -> Any:
        if f"{kind}.{name}" not in m:
            raise InteropError(f"the GGUF lacks {kind}.{name}")
        return get(name, None)

    if "token_embd.weight" not in file:
        raise InteropError("the GGUF lacks token_embd.weight")
    heads, dim = int(need("attention.head_count")), int(need("embedding_length"))
    head_dim = int(get("attention.key_length", dim // heads))
    theta, context = float(get("rope.freq_base", 10000.0)), int(need("context_length"))
    for name in ("rope.dimension_count", "attention.value_length"):
        if get(name, head_dim) != head_dim:
            raise InteropError(
                f"the GGUF has {kind}.{name}={get(name, None)}, only the head's size {head_dim} is supported"
            )
    scaling = _scaling(get, context)
    if "rope_freqs.weight" in file:
        if scaling is not None:
            raise InteropError(f"the GGUF scales rotary positions twice: rope_freqs.weight and {kind}.rope.scaling")
        scaling = _llama3_scaling(file["rope_freqs.weight"], head_dim, theta)
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        context_length=context,
        model_dim=dim,
        num_layers=int(need("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        hidden_dim=int(need("feed_forward_length")),
        norm_eps=float(np.round(float(need("attention.layer_norm_rms_epsilon")), 12)),  # stored as float32
        tied="output.weight" not in file,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in file,
        out_bias="blk.0.attn_output.bias" in file,
        qk_norm="blk.0.attn_q_norm.weight" in file,
        window=get("attention.sliding_window", None),
    )


def _scaling(get: Callable[[str, Any], Any], context: int) -> RotaryScaling | None:
    """How rotary positions are scaled, as llama.cpp reads it: a factor without a kind is linear.

    YaRN's `attn_factor` multiplies its usual factor on cosines and sines.
    """
    kind = get("rope.scaling.type", "linear")
    factor = float(get("rope.scaling.factor", 0.0) or get("rope.scale_linear", 0.0) or 1.0)
    attention = float(get("rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise InteropError(f"GGUF rope.scaling.type {kind!r} is not supported; there are none, linear, yarn")
    plain = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0} if kind == "yarn" else {}
    for name, default in {**plain, **({} if kind == "yarn" else {"attn_factor": 1.0})}.items():
        value = float(get(f"rope.scaling.{name}", default))
        if value != default:
            raise InteropError(f"GGUF rope.scaling.{name}={value:g} is not supported with {kind}, only {default:g}")
    if kind == "yarn":
        usual = 0.1 * math.log(factor) + 1
        return RotaryScaling(
            "yarn",
            factor,
            original_length=int(get("rope.scaling.original_context_length", context)),
            beta_fast=float(get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=None if attention == 1 else attention * usual,
        )
    if kind == "none" or factor == 1:
        return None
    return RotaryScaling("linear", factor, int(get("rope.scaling.original_context_length", context)))


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RotaryScaling:
    """Llama 3's scaling is stored as one divisor per frequency; recognised by recomputing it."""
    scaling = RotaryScaling("llama3", float(factors.max()))
    plain, scaled = rotary_frequencies(head_dim, theta)[0], rotary_frequencies(head_dim, theta, scaling)[0]
    if not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise InteropError("rope_freqs.weight holds frequencies of a scaling other than Llama 3's")
    return scaling


def _from_neighbours(heads: int, head_dim: int) -> Any:
    """Undoes GGUF's row order on the last axis: pairs (2i, 2i+1) back to (i, i + H/2)."""

    def fix(w: np.ndarray) -> np.ndarray:
        split = w.reshape(*w.shape[:-1], heads, head_dim // 2, 2)
        return np.swapaxes(split, -1, -2).reshape(w.shape)

    return fix


def rules(config: LlamaConfig, architecture: str) -> list[Rule]:
    """Where each of our parameters is in a GGUF file."""
    ours, theirs, h = "decoder/layers", "blk.{l}", config.attention.head_dim
    out = [Rule("embed/embedding", "token_embd.weight"), Rule("final_norm/scale", "output_norm.weight")]
    if not config.tied:
        out.append(Rule("head/kernel", "output.weight", transposed=True))
    norms = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    norms |= {"attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm"}
    out += [Rule(f"{ours}/{a}/scale", f"{theirs}.{b}.weight") for a, b in norms.items()]
    linears = {
        "attention/query": ("attn_q", config.num_heads), "attention/key": ("attn_k", config.num_kv_heads),
        "attention/value": ("attn_v", 0), "attention/out": ("attn_output", 0),
        "mlp/gate": ("ffn_gate", 0), "mlp/up": ("ffn_up", 0), "mlp/down": ("ffn_down", 0),
    }  # fmt: skip
    for a, (b, heads) in linears.items():
        fix = _from_neighbours(heads, h) if heads and architecture == "llama" else None
        out.append(Rule(f"{ours}/{a}/kernel", f"{theirs}.{b}.weight", transposed=True, forward=fix))
        out.append(Rule(f"{ours}/{a}/bias", f"{theirs}.{b}.bias", forward=fix))
    return out


def ignored(name: str) -> bool:
    """Whether a tensor of the file has no counterpart here."""
    return name in ("rope_freqs.weight",)
