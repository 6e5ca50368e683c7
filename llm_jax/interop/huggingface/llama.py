"""The Llama family in Hugging Face's names."""

from typing import Any

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields, heads
from llm_jax.interop.names import InteropError, Rule, some, without
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.positions import RotaryScaling

# read below; is_llama_config says nothing about the model
READ = frozenset(heads.READ) | frozenset(
    """
    vocab_size max_position_embeddings hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters
    rope_interleaved use_mrope attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types
    attention_dropout initializer_range is_llama_config
    """.split()  # noqa: SIM905
)
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# ours -> theirs, behind the title of the family
CLASSES = {
    "none": "Model",
    "lm": "ForCausalLM",
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


def _classes(kind: str) -> dict[str, str]:
    return {ours: MODEL_TYPES[kind] + theirs for ours, theirs in CLASSES.items()}


# theirs -> ours
SCALING = {
    "original_max_position_embeddings": "original_length", "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
    "attention_factor": "attention_factor", "truncate": "truncate",
}  # fmt: skip
# read here and in config_from_hf; the last says how a model was trained
ROPE = frozenset([*SCALING, "rope_type", "type", "factor", "rope_theta", "mscale", "mscale_all_dim", "finetuned"])


def _scaling(rope: dict[str, Any], context: int) -> RotaryScaling | None:
    whole = {"partial_rotary_factor": 1.0}
    unknown = sorted(k for k, v in rope.items() if k not in ROPE and v not in (*fields.EMPTY, whole.get(k)))
    if unknown:
        raise InteropError(f"rope has {some(unknown)}, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise InteropError(f"rope_type {kind!r} is not supported; there are default, linear, llama3, yarn")
    if kind == "yarn" and (rope.get("mscale") or rope.get("mscale_all_dim")):
        raise InteropError("yarn with mscale is not supported")
    values = {ours: rope[theirs] for theirs, ours in SCALING.items() if rope.get(theirs) is not None}
    values.setdefault("original_length", context)
    return RotaryScaling(kind=kind, factor=float(rope["factor"]), **values)


def _window(c: dict[str, Any], kind: str) -> int | None:
    """Width of the sliding window of all layers; Qwen's classes let the layers from `max_window_layers` on slide."""
    if kind == "llama":
        return None
    window, count, kinds = c["sliding_window"], c["num_hidden_layers"], c.get("layer_types")
    if kind == "mistral":  # its class slides in all layers, whatever their types are
        if window is not None and "full_attention" in (kinds or []):
            raise InteropError("a sliding window in some layers only is not supported")
        return window
    window = window if c["use_sliding_window"] else None
    if not kinds:
        full = count if window is None else min(c["max_window_layers"], count)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (count - full)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) != count:
        raise InteropError(f"layer_types={kinds} must name full_attention or sliding_attention for {count} layers")
    if len(set(kinds)) > 1:
        raise InteropError("a sliding window in some layers only is not supported")
    if kinds[0] == "sliding_attention" and window is None:
        raise InteropError("layer_types has sliding_attention, but use_sliding_window=false or sliding_window=null")
    return window if kinds[0] == "sliding_attention" else None


def config_from_hf(c: dict[str, Any]) -> LlamaConfig:
    """Our config from the contents of `config.json`, of transformers 4 and 5."""
    kind = c["model_type"]
    c = fields.checked(c, READ)
    for flag in ("rope_interleaved", "use_mrope"):
        if c.get(flag):
            raise InteropError(f"{flag}=true is not supported")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    context = c["max_position_embeddings"]
    bias = c["attention_bias"] if kind in ("llama", "qwen3") else False
    values = dict(
        vocab_size=c["vocab_size"],
        context_length=context,
        model_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim"),
        hidden_dim=c["intermediate_size"],
        activation=fields.activation(c["hidden_act"], "hidden_act"),
        norm_eps=c["rms_norm_eps"],
        tied=c["tie_word_embeddings"],
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
        rope_scaling=_scaling(rope, context),
        qkv_bias=True if kind == "qwen2" else bias,
        out_bias=bias,
        mlp_bias=c["mlp_bias"] if kind == "llama" else False,
        qk_norm=kind == "qwen3",
        window=_window(c, kind),
        attention_dropout=c["attention_dropout"],
        **heads.on_decoder(c, _classes(kind)),
        init_std=c["initializer_range"],
    )
    return configs.from_dict(LlamaConfig, values)  # checks types: JSON may hold anything


def model_type(config: LlamaConfig) -> str:
    """Which of their architectures holds this config.

    Raises:
      InteropError: if none does.
    """
    if config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias and not config.out_bias:
        kind = "qwen2"
    else:
        kind = "llama" if config.window is None else "mistral"
    if (kind == "mistral" and (config.qkv_bias or config.out_bias)) or (config.mlp_bias and kind != "llama"):
        raise InteropError(f"no Hugging Face architecture has this combination of biases with {kind}")
    if kind in ("llama", "qwen3") and config.qkv_bias != config.out_bias:
        raise InteropError(f"{kind} has biases on all of q, k, v, out or on none")
    return kind


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The contents of `config.json` for our config."""
    kind = model_type(config)
    theirs = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
    out = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "intermediate_size": config.hidden_dim,
        "hidden_act": theirs[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        **heads.on_decoder_to_hf(config, _classes(kind)),
    }
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = config.qkv_bias
    if kind == "llama":
        out["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        out["sliding_window"] = config.window
    if kind.startswith("qwen"):
        out |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
        out["sliding_window"] = config.window
    s = config.rope_scaling
    if s is not None:
        rope = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
            rope |= {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
        if s.kind != "linear":
            rope["original_max_position_embeddings"] = s.original_length
        out["rope_scaling"] = rope
    return out


def root(config: LlamaConfig) -> str:
    """The prefix in their classes with a head; heads for spans have an older one, except Mistral's."""
    return "transformer." if config.head == "span" and model_type(config) != "mistral" else "model."


def rules(config: LlamaConfig) -> list[Rule]:
    """Where each of our parameters is; their kernels are `[out, in]`."""
    prefix = root(config)
    ours, theirs = "decoder/layers", f"{prefix}layers.{{l}}"
    out = [Rule("embed/embedding", f"{prefix}embed_tokens.weight"), Rule("final_norm/scale", f"{prefix}norm.weight")]
    out.append(Rule(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"))
    out.append(Rule(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"))
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    linears = {f"attention/{a}": f"self_attn.{b}" for a, b in attention.items()}
    linears |= {f"mlp/{a}": f"mlp.{a}_proj" for a in ("gate", "up", "down")}
    for a, b in linears.items():
        out.append(Rule(f"{ours}/{a}/kernel", f"{theirs}.{b}.weight", transposed=True))
        out.append(Rule(f"{ours}/{a}/bias", f"{theirs}.{b}.bias"))
    if config.qk_norm:
        out += [
            Rule(f"{ours}/attention/{a}_norm/scale", f"{theirs}.self_attn.{a[0]}_norm.weight") for a in ("query", "key")
        ]
    out += heads.rules_on_decoder(config, tokens="score")
    return without(prefix, out) if config.head == "none" else out  # so do their headless classes


def ignored(config: LlamaConfig, name: str) -> bool:
    """Whether their tensor has no counterpart here: buffers, an output layer that is tied or unused."""
    spare = config.tied or config.head != "lm"
    return name.endswith("rotary_emb.inv_freq") or (spare and name == "lm_head.weight")
