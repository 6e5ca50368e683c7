"""Marian (opus-mt) in Hugging Face's names."""

from typing import Any

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields
from llm_jax.interop.names import InteropError, Rule, linear, norm
from llm_jax.models.transformer import TransformerConfig

CLASSES = ("MarianMTModel", "MarianModel")

# ours -> theirs
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "model_dim": "d_model",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "encoder_attention_heads",
    "num_decoder_heads": "decoder_attention_heads",
    "hidden_dim": "encoder_ffn_dim",
    "decoder_hidden_dim": "decoder_ffn_dim",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "init_std": "init_std",
    "scale_embedding": "scale_embedding",
    "start_id": "decoder_start_token_id",
}
# fields that must hold what this library computes
FIXED: dict[str, tuple[Any, ...]] = {
    "share_encoder_decoder_embeddings": (True,),
    "tie_word_embeddings": (True,),
    "normalize_before": (False,),
    "add_final_layer_norm": (False,),
    "normalize_embedding": (False,),
    "add_bias_logits": (False,),
    "extra_pos_embeddings": (0,),
    "static_position_embeddings": (True,),
    "encoder_layerdrop": (0.0,),
    "decoder_layerdrop": (0.0,),
    "is_decoder": (False,),
}
READ = (
    *("activation_function", "decoder_vocab_size", "num_hidden_layers"),
    *("classifier_dropout", "classif_dropout"),  # of a head that is not here
)

LAYER = {
    "encoder": {"attention": "self_attn"},
    "decoder": {"attention": "self_attn", "cross_attention": "encoder_attn"},
}
MLP = {"up": "fc1", "down": "fc2"}


def config_from_hf(c: dict[str, Any]) -> TransformerConfig:
    """Our config from the contents of `config.json`."""
    c = fields.checked(c, {*FIELDS.values(), *READ}, FIXED)
    name = (c.get("architectures") or ["MarianMTModel"])[0]
    if name not in CLASSES:
        raise InteropError(f"architectures {name!r} is not supported; there are {', '.join(CLASSES)}")
    if c.get("decoder_vocab_size") not in (None, c["vocab_size"]):
        raise InteropError(f"decoder_vocab_size={c['decoder_vocab_size']} differs from vocab_size: not supported")
    values = {ours: c[theirs] for ours, theirs in FIELDS.items()}
    for decoder, encoder in (("num_decoder_heads", "num_heads"), ("decoder_hidden_dim", "hidden_dim")):
        values[decoder] = None if values[decoder] == values[encoder] else values[decoder]
    values |= {
        "activation": fields.activation(c["activation_function"]),
        "norm": "post",
        "sinusoids": "halves",
        "logits_bias": True,
        "banned_ids": fields.banned(c),
    }
    return configs.from_dict(TransformerConfig, values)


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The contents of `config.json` for our config.

    Raises:
      InteropError: for a Transformer that is not a Marian.
    """
    fixed = {"norm": "post", "sinusoids": "halves", "logits_bias": True, "tied": True, "norm_eps": 1e-5}
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise InteropError(f"Marian's format has {field}={value!r}, this model {getattr(config, field)!r}")
    out = {their: getattr(config, ours) for ours, their in FIELDS.items()}
    return out | {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "decoder_layers": config.depth[1],
        "decoder_attention_heads": config.num_decoder_heads or config.num_heads,
        "decoder_ffn_dim": config.decoder_hidden_dim or config.hidden_dim,
        "decoder_vocab_size": config.vocab_size,
        "init_std": config.block.attention.init_std,
        "activation_function": fields.activation_to_hf(config.activation),
        "is_encoder_decoder": True,
        "share_encoder_decoder_embeddings": True,
        "pad_token_id": config.start_id,
        "eos_token_id": 0,
        "static_position_embeddings": True,
        **fields.banned_to_hf(config.banned_ids),
    }


def root(config: TransformerConfig) -> str:
    """The prefix of the model's names in their classes with a head."""
    del config
    return "model."


def rules(config: TransformerConfig) -> list[Rule]:
    """Where each of our parameters is; their kernels are `[out, in]`."""
    out = [Rule("embed/embedding", "model.shared.weight")]
    for stack, attentions in LAYER.items():
        ours, theirs = f"{stack}/layers", f"model.{stack}.layers.{{l}}"
        for name, their in attentions.items():
            for kernel in ("query", "key", "value", "out"):
                projection = "out_proj" if kernel == "out" else f"{kernel[0]}_proj"
                out += linear(f"{ours}/{name}/{kernel}", f"{theirs}.{their}.{projection}")
            out += norm(f"{ours}/{name}_norm", f"{theirs}.{their}_layer_norm")
        for kernel, their in MLP.items():
            out += linear(f"{ours}/mlp/{kernel}", f"{theirs}.{their}")
        out += norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")
    if config.logits_bias:
        flat, row = (lambda x: x.reshape(-1)), (lambda x: x.reshape(1, -1))
        out.append(Rule("logits_bias", "final_logits_bias", forward=flat, backward=row))
    return out


def ignored(config: TransformerConfig, name: str) -> bool:
    """Whether their tensor has no counterpart here: copies of the table, the tied head, the sinusoids."""
    del config
    return name == "lm_head.weight" or name.endswith(("embed_tokens.weight", "embed_positions.weight"))
