"""Fields of config.json that every family treats alike: absent ones, ones without effect, and all others."""

import pytest

from llm_jax.interop.huggingface import fields
from llm_jax.interop.names import InteropError
from llm_jax.interop.pretrained import FAMILIES

# what transformers 4 wrote into every config.json, and what other tools add
OLD = dict(
    return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False, torch_dtype="bfloat16",
    use_bfloat16=False, tf_legacy_loss=False, pruned_heads={}, chunk_size_feed_forward=0, is_encoder_decoder=False,
    cross_attention_hidden_size=None, tie_encoder_decoder=False, finetuning_task=None, tokenizer_class=None,
    prefix=None,
    task_specific_params=None, problem_type="single_label_classification", _name_or_path="org/name",
    _commit_hash=None, transformers_version="4.30.0", max_length=20, min_length=0, do_sample=False,
    early_stopping=False, num_beams=1, num_beam_groups=1, diversity_penalty=0.0, temperature=1.0, top_k=50, top_p=1.0,
    typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0, num_return_sequences=1,
    encoder_no_repeat_ngram_size=0, bad_words_ids=None, output_scores=False, return_dict_in_generate=False,
    forced_bos_token_id=None, forced_eos_token_id=None, remove_invalid_values=False, suppress_tokens=None,
    exponential_decay_length_penalty=None, begin_suppress_tokens=None, sep_token_id=None, use_cache=False,
    gradient_checkpointing=True, quantization_config=None, a_field_of_tomorrow=None, another={}, unsloth_fixed=True,
)  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_fields_without_effect_are_accepted(kind):
    read = FAMILIES[kind].config_from_hf
    assert read({"model_type": kind, **OLD}) == read({"model_type": kind})


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "field, value, words",
    [
        ("pruned_heads", {"0": [1]}, "pruned_heads={'0': [1]} is not supported, only {}"),
        ("quantization_config", {"bits": 4}, "quantization_config={'bits': 4} is not supported, only None"),
        ("tie_encoder_decoder", True, "tie_encoder_decoder=True is not supported, only False"),
        ("a_field_of_tomorrow", 0, "config.json has a_field_of_tomorrow, which this library does not know"),
    ],
)
def test_fields_that_may_change_something_are_named(kind, field, value, words):
    with pytest.raises(InteropError) as error:
        FAMILIES[kind].config_from_hf({"model_type": kind, field: value})
    assert words in str(error.value)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("distilbert", "sinusoidal_pos_embds", True),
        ("llama", "pretraining_tp", 2),
        ("llama", "partial_rotary_factor", 1.0),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("xlnet", "summary_type", "mean"),  # of heads that read one state for a row, and this is none
        ("qwen2", "mlp_bias", True),
    ],
)
def test_a_familys_fields_without_effect(kind, field, value):
    read = FAMILIES[kind].config_from_hf
    assert read({"model_type": kind, field: value}) == read({"model_type": kind})


def test_every_family_has_its_defaults():
    assert fields.DEFAULTS.keys() == FAMILIES.keys()
    # an absent field is filled in, a null stays
    read = fields.checked({"model_type": "mistral", "sliding_window": None}, fields.DEFAULTS["mistral"])
    assert (read["sliding_window"], read["num_key_value_heads"]) == (None, 8)
