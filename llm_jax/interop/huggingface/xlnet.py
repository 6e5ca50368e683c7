"""XLNet in Hugging Face's names."""

from typing import Any

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields, heads
from llm_jax.interop.names import InteropError, Rule, linear, norm, without
from llm_jax.models.xlnet import XLNetConfig

CLASSES = {
    "none": "XLNetModel",
    "lm": "XLNetLMHeadModel",
    "classification": "XLNetForSequenceClassification",
    "tokens": "XLNetForTokenClassification",
    "span": "XLNetForQuestionAnsweringSimple",
    "choice": "XLNetForMultipleChoice",
}
# ours -> theirs
FIELDS = {
    "vocab_size": "vocab_size",
    "model_dim": "d_model",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_dim": "d_inner",
    "norm_eps": "layer_norm_eps",
    "dropout": "dropout",
    "memory_length": "mem_len",
    "reuse_length": "reuse_len",
    "same_length": "same_length",
    "head_dropout": "summary_last_dropout",
    "init_std": "initializer_range",
}
# fields that must hold what this library computes
FIXED: dict[str, tuple[Any, ...]] = {"untie_r": (True,), "tie_word_embeddings": (True,)}
# the same, of heads that read one state for a row
SUMMARY: dict[str, tuple[Any, ...]] = {
    "summary_type": ("last",),
    "summary_use_proj": (True,),
    "summary_activation": ("tanh",),
}
# how a memory is used, and which rows run backwards, is the caller's choice here; the beams are of a head that is not
# here; d_head and the last are other spellings
READ = (
    *("ff_activation", "attn_type", "clamp_len", "d_head", "n_token", "id2label", "label2id", "num_labels"),
    *("use_mems_eval", "use_mems_train", "bi_data", "start_n_top", "end_n_top", "summary_first_dropout", "use_mems"),
)
# ours -> theirs, in a layer
KERNELS = {"query": "q", "key": "k", "value": "v", "out": "o", "position": "r"}
VECTORS = {
    "content_bias": "r_w_bias",
    "position_bias": "r_r_bias",
    "segment_bias": "r_s_bias",
    "segments": "seg_embed",
}


def config_from_hf(c: dict[str, Any]) -> XLNetConfig:
    """Our config from the contents of `config.json`."""
    head = heads.of(c, CLASSES, "none")
    fixed = FIXED | SUMMARY if head in ("classification", "choice") else FIXED
    c = fields.checked(c, {*FIELDS.values(), *READ, *SUMMARY}, fixed)
    values = {ours: c[theirs] for ours, theirs in FIELDS.items() if theirs in c}
    kind, clamp = c["attn_type"], c["clamp_len"]
    if kind not in ("bi", "uni"):
        raise InteropError(f"attn_type={kind!r} is neither bi nor uni")
    if c.get("d_head") not in (None, values["model_dim"] // values["num_heads"]):
        raise InteropError(f"d_head={c['d_head']} is not d_model / n_head: not supported")
    values |= {
        "activation": fields.activation(c["ff_activation"]),
        "causal_mask": kind == "uni",
        "clamp_length": clamp if clamp and clamp > 0 else None,
        "memory_length": values["memory_length"] or 0,
        "reuse_length": c.get("reuse_len") or None,
        "head": head,
        "labels": heads.labels_of(c),
    }
    return configs.from_dict(XLNetConfig, values)


def config_to_hf(config: XLNetConfig) -> dict[str, Any]:
    """The contents of `config.json` for our config."""
    out = {their: getattr(config, ours) for ours, their in FIELDS.items()}
    return out | {
        "model_type": "xlnet",
        "architectures": [CLASSES[config.head]],
        "ff_activation": fields.activation_to_hf(config.activation),
        "attn_type": "uni" if config.causal_mask else "bi",
        "bi_data": False,  # theirs would reverse the second half of any batch
        "clamp_len": -1 if config.clamp_length is None else config.clamp_length,
        "d_head": config.model_dim // config.num_heads,
        **heads.labels_to_hf(config),
    }


def root(config: XLNetConfig) -> str:
    """The prefix of the model's names in their classes with a head."""
    del config
    return "transformer."


def rules(config: XLNetConfig) -> list[Rule]:
    """Where each of our parameters is; their attention kernels are `[D, N, H]`, the others `[out, in]`."""
    d, n = config.model_dim, config.num_heads
    flat, deep = (lambda x: x.reshape(d, d)), (lambda x: x.reshape(d, n, d // n))
    over, back = (lambda x: x.reshape(d, d).T), (lambda x: x.T.reshape(d, n, d // n))
    out = [
        Rule("embed/embedding", "transformer.word_embedding.weight"),
        Rule(
            *("query", "transformer.mask_emb"),
            forward=lambda x: x.reshape(-1),
            backward=lambda x: x.reshape(1, 1, -1),
        ),
    ]
    ours, theirs = "encoder/layers", "transformer.layer.{l}"
    for name, their in KERNELS.items():
        there, again = (over, back) if name == "out" else (flat, deep)
        out.append(Rule(f"{ours}/attention/{name}/kernel", f"{theirs}.rel_attn.{their}", forward=there, backward=again))
    for name, their in VECTORS.items():
        out.append(Rule(f"{ours}/attention/{name}", f"{theirs}.rel_attn.{their}"))
    out += norm(f"{ours}/attention_norm", f"{theirs}.rel_attn.layer_norm")
    out += norm(f"{ours}/mlp_norm", f"{theirs}.ff.layer_norm")
    out += linear(f"{ours}/mlp/up", f"{theirs}.ff.layer_1") + linear(f"{ours}/mlp/down", f"{theirs}.ff.layer_2")
    if config.head == "lm":
        out.append(Rule("logits_bias", "lm_loss.bias"))
    elif config.head in ("classification", "choice"):
        out += linear("pooler", "sequence_summary.summary") + linear("classifier", "logits_proj")
    elif config.head != "none":
        out += linear("classifier", "classifier" if config.head == "tokens" else "qa_outputs")
    return without("transformer.", out) if config.head == "none" else out  # so does their headless class


def ignored(config: XLNetConfig, name: str) -> bool:
    """Whether their tensor has no counterpart here: the tied head, and an output layer that the class does not use."""
    return name == "lm_loss.weight" or (config.head != "lm" and name == "lm_loss.bias")
