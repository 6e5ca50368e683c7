"""T5 and mT5 in Hugging Face's names."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields, heads
from llm_jax.interop.huggingface.fields import ACTIVATIONS
from llm_jax.interop.names import InteropError, Rule, linear
from llm_jax.models.t5 import T5Config

# ours -> theirs; then what an encoder alone is, and an old spelling
CLASSES = {
    "none": "T5Model",
    "lm": "T5ForConditionalGeneration",
    "classification": "T5ForSequenceClassification",
    "tokens": "T5ForTokenClassification",
    "span": "T5ForQuestionAnswering",
}
ENCODER = "T5EncoderModel"
ALSO = {ENCODER: "none", "T5WithLMHeadModel": "lm"}

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
    "head_dropout": "classifier_dropout",
    "init_factor": "initializer_factor",
}
READ = (
    *("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"),
    "is_decoder",
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
    """Our config from the contents of `config.json`."""
    c = fields.checked(c, {*FIELDS.values(), *READ})
    wrote = [name.removeprefix("M") for name in c.get("architectures") or []]  # mT5's classes are T5's
    head = heads.of({"architectures": wrote}, CLASSES, "lm", ALSO)
    kind, _, rest = c["feed_forward_proj"].rpartition("-")
    activation = "gelu_new" if (kind, rest) == ("gated", "gelu") else rest  # theirs means the approximation there
    if kind not in ("", "gated") or activation not in ACTIVATIONS:
        raise InteropError(
            f"feed_forward_proj={c['feed_forward_proj']!r} is not supported; there are NAME and gated-NAME of "
            f"{', '.join(ACTIVATIONS)}"
        )
    values = {ours: c[theirs] for ours, theirs in FIELDS.items() if theirs in c}
    tied = c["tie_word_embeddings"] is not False
    end = c.get("eos_token_id", 1)
    values |= {
        "activation": ACTIVATIONS[activation],
        "gated": kind == "gated",
        "tied": tied,
        "scale_output": c.get("scale_decoder_outputs", tied and c.get("model_type") != "mt5"),
        "decoder": head != "tokens" and ENCODER not in wrote,
        "head": head,
        "labels": heads.labels_of(c),
        "start_id": c.get("decoder_start_token_id") or 0,
        "end_id": (end[0] if isinstance(end, list) else end) or 1,
        "banned_ids": fields.banned(c),
    }
    return configs.from_dict(T5Config, values)


def fit(config: T5Config, tensors: Collection[str]) -> T5Config:
    """The same, untied if the file has an output layer: transformers 5 always writes tied."""
    return dataclasses.replace(config, tied="lm_head.weight" not in tensors) if config.head == "lm" else config


def with_head(config: T5Config, head: str, labels: Sequence[str]) -> T5Config:
    """The same model under another head, which stands on the decoder or on the encoder alone."""
    decoder = config.decoder if head == "none" else head != "tokens"
    return dataclasses.replace(config, head=head, labels=tuple(labels) or config.labels, decoder=decoder)


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The contents of `config.json` for our config."""
    head, approximate = config.head, config.gated and config.activation == "gelu_tanh"
    name = "gelu" if approximate else fields.activation_to_hf(config.activation)
    if config.gated and config.activation == "gelu":
        raise InteropError("T5's format has no exact gelu in its gates")
    if config.scale_output and not config.tied and config.head == "lm":
        raise InteropError("T5's format scales the output of tied models alone")
    multilingual = config.tied and not config.scale_output and config.head == "lm"  # what only mT5's classes are
    out = {their: getattr(config, ours) for ours, their in FIELDS.items()}
    return out | {
        "model_type": "mt5" if multilingual else "t5",
        "architectures": ["M" * multilingual + (CLASSES[head] if config.decoder or head == "tokens" else ENCODER)],
        "num_decoder_layers": config.depth[1],
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "tie_word_embeddings": config.tied,
        **({} if config.head == "lm" else {"scale_decoder_outputs": config.scale_output}),
        **(heads.labels_to_hf(config) if config.head in ("classification", "tokens") else {}),
        "is_encoder_decoder": config.decoder,
        "pad_token_id": config.start_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.start_id,
        **fields.banned_to_hf(config.banned_ids),
    }


def root(config: T5Config) -> str:
    """The prefix of the model's names in their classes with a head."""
    return "transformer." if config.head in ("classification", "tokens") else ""


def rules(config: T5Config) -> list[Rule]:
    """Where each of our parameters is; their kernels are `[out, in]`."""
    prefix = root(config)
    out = [Rule("embed/embedding", f"{prefix}shared.weight")]
    for stack, parts in PARTS.items():
        if stack == "decoder" and not config.decoder:
            continue
        layer = f"{prefix}{stack}.block.{{l}}.layer"
        table = f"{prefix}{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(Rule(f"{stack}_positions/embedding", table))
        out.append(Rule(f"{stack}_norm/scale", f"{prefix}{stack}.final_layer_norm.weight"))
        ups = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
        for ours, (number, theirs) in parts.items():
            out.append(Rule(f"{stack}/layers/{ours}_norm/scale", f"{layer}.{number}.layer_norm.weight"))
            kernels = {**ups, "down": "wo"} if ours == "mlp" else ATTENTION
            for kernel, name in kernels.items():
                path = f"{stack}/layers/{ours}/{kernel}/kernel"
                out.append(Rule(path, f"{layer}.{number}.{theirs}.{name}.weight", transposed=True))
    if config.head == "lm" and config.decoder and not config.tied:
        out += linear("head", "lm_head", bias=False)
    elif config.head == "classification":
        out += linear("pooler", "classification_head.dense") + linear("classifier", "classification_head.out_proj")
    elif config.head in ("tokens", "span"):
        out += linear("classifier", "classifier" if config.head == "tokens" else "qa_outputs")
    return out


def ignored(config: T5Config, name: str) -> bool:
    """Whether their tensor has no counterpart here: copies of the table, a bias that cross-attention never used."""
    name = name.removeprefix(root(config))
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return name in copies or name == unused or (not config.decoder and name.startswith(("decoder.", "lm_head.")))
