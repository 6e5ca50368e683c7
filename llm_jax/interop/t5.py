"""T5 and mT5 in Hugging Face's names."""

import dataclasses
from collections.abc import Collection
from typing import Any

from llm_jax import config as configs
from llm_jax.interop.names import ACTIVATIONS, InteropError, Rule, banned, refuse_unknown
from llm_jax.models.t5 import T5Config

CLASSES = ("T5ForConditionalGeneration", "T5Model", "T5EncoderModel", "T5WithLMHeadModel")

# ours -> theirs
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "model_dim": "d_model",
    "num_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "hidden_dim": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "dropout_rate",
    "init_factor": "initializer_factor",
}
READ = (
    *("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"),
    *("classifier_dropout", "is_decoder", "gradient_checkpointing"),
)

# ours -> theirs; a layer's parts are numbered, and cross-attention moves the feed-forward
ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
PARTS = {
    "encoder": {"attention": ("0", "SelfAttention"), "mlp": ("1", "DenseReluDense")},
    "decoder": {
        "attention": ("0", "SelfAttention"),
        "cross_attention": ("1", "EncDecAttention"),
        "mlp": ("2", "DenseReluDense"),
    },
}


def config_from_hf(c: dict[str, Any]) -> T5Config:
    """From the contents of `config.json`."""
    refuse_unknown(c, {*FIELDS.values(), *READ})
    name = (c.get("architectures") or ["T5ForConditionalGeneration"])[0].removeprefix("M")
    if name not in CLASSES:
        raise InteropError(f"architectures {name!r} is not supported; there are {', '.join(CLASSES)}")
    kind, _, rest = c.get("feed_forward_proj", "relu").rpartition("-")
    activation = "gelu_new" if (kind, rest) == ("gated", "gelu") else rest  # theirs means the approximation there
    if kind not in ("", "gated") or activation not in ACTIVATIONS:
        raise InteropError(
            f"feed_forward_proj={c['feed_forward_proj']!r} is not supported; there are NAME and gated-NAME of "
            f"{', '.join(ACTIVATIONS)}"
        )
    values = {ours: c[theirs] for ours, theirs in FIELDS.items() if theirs in c}
    tied = c.get("tie_word_embeddings", True) is not False
    values |= {
        "activation": ACTIVATIONS[activation],
        "gated": kind == "gated",
        "tied": tied,
        "scale_output": c.get("scale_decoder_outputs", tied and c.get("model_type") != "mt5"),
        "decoder": name != "T5EncoderModel",
        "start_id": c.get("decoder_start_token_id") or 0,
        "banned_ids": banned(c),
    }
    return configs.from_dict(T5Config, values)


def fit(config: T5Config, tensors: Collection[str]) -> T5Config:
    """An output layer of its own is there or not, whatever the config says (transformers 5 writes tied always)."""
    return dataclasses.replace(config, tied="lm_head.weight" not in tensors)


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The contents of `config.json`."""
    theirs = {v: k for k, v in reversed(ACTIVATIONS.items())}
    name = "gelu" if config.gated and config.activation == "gelu_tanh" else theirs[config.activation]
    if config.gated and config.activation == "gelu":
        raise InteropError("T5's format has no exact gelu in its gates")
    if config.tied is not config.scale_output:
        raise InteropError("T5's format scales the output of tied models, and of no others")
    out = {their: getattr(config, ours) for ours, their in FIELDS.items()}
    return out | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration" if config.decoder else "T5EncoderModel"],
        "num_decoder_layers": config.depth[1],
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "tie_word_embeddings": config.tied,
        "is_encoder_decoder": config.decoder,
        "pad_token_id": config.start_id,
        "eos_token_id": 1,
        "decoder_start_token_id": config.start_id,
        **({"bad_words_ids": [[i] for i in config.banned_ids]} if config.banned_ids else {}),
    }


def root(config: T5Config) -> str:
    """Their classes agree on all names."""
    del config
    return ""


def rules(config: T5Config) -> list[Rule]:
    """Where everything is; their kernels are `[out, in]`."""
    out = [Rule("embed/embedding", "shared.weight")]
    for stack, parts in PARTS.items():
        if stack == "decoder" and not config.decoder:
            continue
        layer = f"{stack}.block.{{l}}.layer"
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(Rule(f"{stack}_positions/embedding", table))
        out.append(Rule(f"{stack}_norm/scale", f"{stack}.final_layer_norm.weight"))
        ups = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
        for ours, (number, theirs) in parts.items():
            out.append(Rule(f"{stack}/layers/{ours}_norm/scale", f"{layer}.{number}.layer_norm.weight"))
            kernels = {**ups, "down": "wo"} if ours == "mlp" else ATTENTION
            for kernel, name in kernels.items():
                path = f"{stack}/layers/{ours}/{kernel}/kernel"
                out.append(Rule(path, f"{layer}.{number}.{theirs}.{name}.weight", transposed=True))
    if config.decoder and not config.tied:
        out.append(Rule("head/kernel", "lm_head.weight", transposed=True))
    return out


def ignored(config: T5Config, name: str) -> bool:
    """Their tensors without a counterpart: copies of the table, a bias that cross-attention never used."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return name in copies or name == unused or (not config.decoder and name.startswith(("decoder.", "lm_head.")))
