"""GPT-1 and GPT-2 in Hugging Face's names."""

from typing import Any

from llm_jax import config as configs
from llm_jax.interop.huggingface import fields, heads
from llm_jax.interop.names import InteropError, Rule, norm, without
from llm_jax.models.gpt import GPTConfig

# read below; the summary_* fields are of a head that is not here, n_ctx is n_positions again, and
# reorder_and_upcast_attn computes the same scores in another order
READ = frozenset(heads.READ) | frozenset(
    """
    scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention scale_attn_weights afn
    activation_function vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon tie_word_embeddings
    resid_pdrop embd_pdrop attn_pdrop initializer_range n_ctx summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels n_special predict_special_tokens
    """.split()  # noqa: SIM905
)


# ours -> theirs
CLASSES = {
    "gpt2": {
        "none": "GPT2Model",
        "lm": "GPT2LMHeadModel",
        "classification": "GPT2ForSequenceClassification",
        "tokens": "GPT2ForTokenClassification",
        "span": "GPT2ForQuestionAnswering",
    },
    "openai-gpt": {
        "none": "OpenAIGPTModel",
        "lm": "OpenAIGPTLMHeadModel",
        "classification": "OpenAIGPTForSequenceClassification",
    },
}


def config_from_hf(c: dict[str, Any]) -> GPTConfig:
    """Our config from the contents of `config.json`."""
    first = c["model_type"] == "openai-gpt"
    c = fields.checked(c, READ)
    for flag in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if c.get(flag):
            raise InteropError(f"{flag}=true is not supported")
    if not c.get("scale_attn_weights", True):
        raise InteropError("scale_attn_weights=false is not supported")
    name = c["afn"] if first else c["activation_function"]
    values = dict(
        vocab_size=c["vocab_size"],
        context_length=c["n_positions"],
        model_dim=c["n_embd"],
        num_layers=c["n_layer"],
        num_heads=c["n_head"],
        hidden_dim=c.get("n_inner"),
        norm="post" if first else "pre",
        # GPT-1's "gelu" is the tanh approximation too (transformers' modeling_openai.py)
        activation="gelu_tanh" if first and name == "gelu" else fields.activation(name),
        norm_eps=c["layer_norm_epsilon"],
        tied=c["tie_word_embeddings"],
        dropout=c["resid_pdrop"],
        embed_dropout=None if c["embd_pdrop"] == c["resid_pdrop"] else c["embd_pdrop"],
        attention_dropout=c["attn_pdrop"],
        **heads.on_decoder(c, CLASSES[c["model_type"]]),
        init_std=c["initializer_range"],
    )
    return configs.from_dict(GPTConfig, values)  # checks types: JSON may hold anything


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The contents of `config.json` for our config."""
    if config.positions != "learned":
        raise InteropError(f"GPT's format has learned positions and not positions={config.positions!r}")
    first = config.norm == "post"
    if first and config.hidden_dim not in (None, 4 * config.model_dim):
        raise InteropError("GPT-1's format has no hidden_dim other than 4 * model_dim")
    name = fields.activation_to_hf(config.activation)
    if first and config.activation == "gelu":
        raise InteropError("GPT-1's format has no exact gelu")
    kind = "openai-gpt" if first else "gpt2"
    return {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.model_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "afn" if first else "activation_function": "gelu" if first and config.activation == "gelu_tanh" else name,
        **({} if first else {"n_inner": config.hidden_dim}),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embed_dropout is None else config.embed_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
        **heads.on_decoder_to_hf(config, CLASSES[kind]),
    }


def root(config: GPTConfig) -> str:
    """The prefix of the model's names in their classes with a head."""
    del config
    return "transformer."


def rules(config: GPTConfig) -> list[Rule]:
    """Where each of our parameters is; their Conv1D kernels are `[in, out]` like ours, q, k and v in one."""
    first = config.norm == "post"
    table = "transformer.tokens_embed" if first else "transformer.wte"
    positions = "transformer.positions_embed" if first else "transformer.wpe"
    out = [Rule("embed/embedding", f"{table}.weight"), Rule("positions/embedding", f"{positions}.weight")]
    ours, theirs, d = "decoder/layers", "transformer.h.{l}", config.model_dim
    for kind in ("kernel", "bias"):
        their = "weight" if kind == "kernel" else "bias"
        for i, name in enumerate(("query", "key", "value")):
            out.append(Rule(f"{ours}/attention/{name}/{kind}", f"{theirs}.attn.c_attn.{their}", part=(i, (d, d, d))))
        out.append(Rule(f"{ours}/attention/out/{kind}", f"{theirs}.attn.c_proj.{their}"))
        out.append(Rule(f"{ours}/mlp/up/{kind}", f"{theirs}.mlp.c_fc.{their}"))
        out.append(Rule(f"{ours}/mlp/down/{kind}", f"{theirs}.mlp.c_proj.{their}"))
    out += norm(f"{ours}/attention_norm", f"{theirs}.ln_1") + norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
    out += [] if first else norm("final_norm", "transformer.ln_f")
    out += heads.rules_on_decoder(config, tokens="classifier")
    return without("transformer.", out) if config.head == "none" else out  # so do their headless classes


def ignored(config: GPTConfig, name: str) -> bool:
    """Whether their tensor has no counterpart here: mask buffers, an output layer that is tied or unused."""
    spare = config.tied or config.head != "lm"
    return name.endswith((".attn.bias", ".attn.masked_bias")) or (spare and name == "lm_head.weight")
