"""An absent field of config.json means what it means to transformers; fields without effect leave its logits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from llm_jax import interop
from llm_jax.interop.huggingface import fields
from llm_jax.interop.huggingface.llama import MODEL_TYPES
from llm_jax.interop.pretrained import FAMILIES


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_the_config_classes(kind):
    cls = transformers.CONFIG_MAPPING[kind]
    # T5 sets tie_word_embeddings when it is made; Qwen changes sliding_window then
    theirs = {f: getattr(cls, f, None) for f in fields.DEFAULTS[kind]}
    assert {f: getattr(cls(), f) if v is None else v for f, v in theirs.items()} == fields.DEFAULTS[kind]


WINDOWS = {kind: {"use_sliding_window": True} for kind in FAMILIES if kind.startswith("qwen")}


@pytest.mark.parametrize("kind, more", [*((kind, {}) for kind in FAMILIES), *WINDOWS.items()], ids=str)
def test_every_field_may_be_absent(kind, more):
    """Dropping fields of a file changes what is read just as it changes what transformers reads."""
    cls = transformers.CONFIG_MAPPING[kind]

    def read(theirs):
        config = FAMILIES[kind].config_from_hf(theirs)
        heads = config.attention.head_dim if kind in MODEL_TYPES else None
        return dataclasses.asdict(config) | {"head_dim": heads, "num_decoder_layers": getattr(config, "depth", None)}

    clean = lambda c: {k: v for k, v in c.to_dict().items() if k != "architectures"}
    more = more | ({"num_hidden_layers": 20} if more else {})
    whole = clean(cls(**more))
    assert read({"model_type": kind, **more}) == read(whole)
    for field in whole.keys() - {"model_type", "layer_types", *more}:
        less = {k: v for k, v in whole.items() if k not in (field, "layer_types")}
        assert read(less) == read(clean(cls.from_dict(dict(less)))), field


TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8)  # fmt: skip
IDS = np.arange(1, 13)[None]
CASES = {
    "qwen2 from layer 28 on": ("Qwen2", dict(use_sliding_window=True, sliding_window=3), ("max_window_layers",)),
    "qwen2 behind the last": ("Qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=4), ()),
    "qwen3 everywhere": ("Qwen3", dict(use_sliding_window=True, sliding_window=3, max_window_layers=0), ()),
    "mistral": ("Mistral", dict(sliding_window=3), ()),
    "llama's slices": ("Llama", dict(pretraining_tp=2), ()),
    "gpt2's order of scores": (
        "GPT2",
        dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, reorder_and_upcast_attn=True, attn_implementation="eager"),
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_windows_and_slices_equal_theirs(name, tmp_path):
    kind, values, dropped = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**({} if kind == "GPT2" else TINY), **values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in stored.items() if k not in (*dropped, "layer_types")}))
    with torch.no_grad():
        want = type(model).from_pretrained(tmp_path).eval()(torch.tensor(IDS)).logits.numpy()
    ours = interop.load(tmp_path)
    np.testing.assert_allclose(ours.model.apply({"params": ours.params}, IDS).logits, want, rtol=1e-5, atol=1e-5)
