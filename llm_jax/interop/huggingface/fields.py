"""Fields of a `config.json`: what an absent field means, which fields change nothing; all others are read or refused.

transformers writes the fields of a config class, reads what a file leaves out as the class's default, and ignores
fields that its code does not read. Here every field is read, listed as one that changes nothing, or refused by name.

Source: transformers 5's `configuration_*.py` of each family, and 4's `configuration_utils.py` for fields that older
versions wrote.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_jax.interop.names import InteropError, some

# fields that change no number of a forward pass, whatever they hold
INERT = frozenset(
    """
    _num_labels output_past name xla_device tie_weights_ directionality sentence_transformers transformers.js_config
    sbert_ce_default_activation_function
    model_type architectures transformers_version torch_dtype dtype _name_or_path auto_map finetuning_task
    problem_type task_specific_params tokenizer_class use_cache return_dict output_hidden_states output_attentions
    torchscript chunk_size_feed_forward is_encoder_decoder bos_token_id eos_token_id sep_token_id pad_token_id
    cls_token_id mask_token_id decoder_start_token_id prefix language _attn_implementation_autoset
    _attn_implementation name_or_path id2label label2id num_labels classifiers_size vocab_size_or_config_json_file
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss use_bfloat16 gradient_checkpointing pretraining_tp sinusoidal_pos_embds
    _commit_hash _attn_implementation_internal attn_implementation attention_implementation use_return_dict
    _flash_attn_2_enabled _experts_implementation max_new_tokens min_new_tokens low_memory penalty_alpha
    max_sequence_length renormalize_logits force_words_ids encoder_repetition_penalty bad_words unsloth_fixed
    unsloth_version
    """.split()  # noqa: SIM905
)
# fields of every family that change something unless they hold one of these
FIXED: dict[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "partial_rotary_factor": (None, 1.0),
}
EMPTY: tuple[Any, ...] = (None, {}, [], "")
# theirs -> ours
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

_LLAMA = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    hidden_act="silu", max_position_embeddings=2048, initializer_range=0.02, rms_norm_eps=1e-6,
    tie_word_embeddings=False, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
)  # fmt: skip
_QWEN = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, hidden_act="silu", max_position_embeddings=32768, initializer_range=0.02,
    rms_norm_eps=1e-6, tie_word_embeddings=False, attention_dropout=0.0, use_sliding_window=False, sliding_window=4096,
    max_window_layers=28,
)  # fmt: skip
_GPT1 = dict(
    vocab_size=40478, n_positions=512, n_embd=768, n_layer=12, n_head=12, afn="gelu", resid_pdrop=0.1, embd_pdrop=0.1,
    attn_pdrop=0.1, layer_norm_epsilon=1e-5, initializer_range=0.02, tie_word_embeddings=True,
)  # fmt: skip
_BERT = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=512,
    type_vocab_size=2, initializer_range=0.02, layer_norm_eps=1e-12, pad_token_id=0, is_decoder=False,
    add_cross_attention=False, tie_word_embeddings=True,
)  # fmt: skip
_ALBERT = dict(
    vocab_size=30000, hidden_size=4096, num_attention_heads=64, intermediate_size=16384, hidden_act="gelu_new",
    hidden_dropout_prob=0, attention_probs_dropout_prob=0, embedding_size=128, num_hidden_groups=1, inner_group_num=1,
    classifier_dropout_prob=0.1,
)  # fmt: skip
_T5 = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, relative_attention_num_buckets=32,
    relative_attention_max_distance=128, dropout_rate=0.1, layer_norm_epsilon=1e-6, initializer_factor=1.0,
    feed_forward_proj="relu", pad_token_id=0, eos_token_id=1, classifier_dropout=0.0, is_decoder=False,
    tie_word_embeddings=True,
)  # fmt: skip
# model_type -> what an absent field means; a field that is in no table means None there
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {k: v for k, v in _LLAMA.items() if k not in ("attention_bias", "mlp_bias")}
    | dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128, attention_bias=False),
    "openai-gpt": _GPT1,
    "gpt2": {k: v for k, v in _GPT1.items() if k != "afn"}
    | dict(
        vocab_size=50257, n_positions=1024, activation_function="gelu_new", scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False,
    ),
    "bert": _BERT,
    "roberta": _BERT | dict(vocab_size=50265, pad_token_id=1),
    "albert": {k: v for k, v in _BERT.items() if k not in ("is_decoder", "add_cross_attention")} | _ALBERT,
    "distilbert": dict(
        vocab_size=30522, max_position_embeddings=512, n_layers=6, n_heads=12, dim=768, hidden_dim=3072, dropout=0.1,
        attention_dropout=0.1, activation="gelu", initializer_range=0.02, qa_dropout=0.1, seq_classif_dropout=0.2,
        pad_token_id=0, tie_word_embeddings=True,
    ),
    "marian": dict(
        vocab_size=58101, max_position_embeddings=1024, encoder_layers=12, encoder_ffn_dim=4096,
        encoder_attention_heads=16, decoder_layers=12, decoder_ffn_dim=4096, decoder_attention_heads=16,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, activation_function="gelu", d_model=1024, dropout=0.1,
        attention_dropout=0.0, activation_dropout=0.0, init_std=0.02, decoder_start_token_id=58100,
        scale_embedding=False, pad_token_id=58100, eos_token_id=0, share_encoder_decoder_embeddings=True,
        is_decoder=False, tie_word_embeddings=True,
    ),
    "t5": _T5,
    "mt5": _T5
    | dict(
        vocab_size=250112, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "xlnet": dict(
        vocab_size=32000, d_model=1024, n_layer=24, n_head=16, d_inner=4096, ff_activation="gelu", attn_type="bi",
        initializer_range=0.02, layer_norm_eps=1e-12, dropout=0.1, mem_len=512, bi_data=False, clamp_len=-1,
        same_length=False, summary_type="last", summary_use_proj=True, summary_activation="tanh",
        summary_last_dropout=0.1, pad_token_id=5, tie_word_embeddings=True,
    ),
}  # fmt: skip


def checked(
    config: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, tuple[Any, ...]] = {}
) -> dict[str, Any]:
    """The fields of a `config.json`; absent fields take the default of its config class.

    Args:
      config: the contents, with `model_type`.
      read: fields that the caller reads.
      fixed: further fields, and the values with which they change nothing; a message shows the first value.

    Raises:
      InteropError: naming a field that might change what a model computes and that nobody here reads, or its value.
    """
    supported = {*INERT, *FIXED, *fixed, *read}
    unknown = sorted(k for k, v in config.items() if k not in supported and v not in EMPTY)
    if unknown:
        raise InteropError(
            f"config.json has {some(unknown)}, which this library does not know; take them out if they change nothing"
        )
    for field, allowed in {**FIXED, **fixed}.items():
        if config.get(field) not in (*allowed, None):
            raise InteropError(f"{field}={config[field]!r} is not supported, only {allowed[0]!r}")
    return {**DEFAULTS[config["model_type"]], **config}


def activation(name: str, field: str = "activation") -> str:
    """Our name of an activation.

    Raises:
      InteropError: naming the field, if there is no such activation here.
    """
    if name not in ACTIVATIONS:
        raise InteropError(f"{field} {name!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_to_hf(ours: str) -> str:
    """Undoes `activation`; of several names that they have for one function it gives the first."""
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def banned(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The entries that `bad_words_ids` keeps from being generated.

    Raises:
      InteropError: on sequences of several.
    """
    words = config.get("bad_words_ids") or []
    if any(len(word) != 1 for word in words):
        raise InteropError(f"bad_words_ids={words!r} has sequences of several tokens, which are not supported")
    return tuple(word[0] for word in words)


def banned_to_hf(ids: Sequence[int]) -> dict[str, list[list[int]]]:
    """Undoes `banned`; no field where nothing is banned."""
    return {"bad_words_ids": [[i] for i in ids]} if ids else {}
