"""Every decoder equals transformers: logits, hidden states, attentions, loss and gradients; and exports load back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from theirs import BOUNDS, DTYPES, check_gradients, exported, noisy, use_doubles

from llm_jax import interop
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.objective import total_loss

SMALL = dict(
    vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=32, tie_word_embeddings=True, head_dim=4,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
GPT = dict(vocab_size=61, n_positions=32, n_embd=36, n_layer=3, n_head=3)
BERT = dict(
    vocab_size=61, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50,
    max_position_embeddings=32, is_decoder=True,
)  # fmt: skip

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gpt2_odd": lambda: transformers.GPT2Config(
        **GPT, n_inner=50, activation_function="gelu", tie_word_embeddings=False
    ),
    "gpt1": lambda: transformers.OpenAIGPTConfig(**GPT),
    "llama_3_of_9": lambda: transformers.LlamaConfig(**SMALL),
    "llama_biases_untied": lambda: transformers.LlamaConfig(
        **{**SMALL, "tie_word_embeddings": False}, attention_bias=True, mlp_bias=True
    ),
    "llama3_scaling": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "yarn_scaling": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
    "linear_scaling": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "wide_heads": lambda: transformers.LlamaConfig(**{**SMALL, "head_dim": 8, "num_attention_heads": 6}),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "bert_decoder": lambda: transformers.BertConfig(**BERT, pad_token_id=None),  # torch gives padding no gradient
    "roberta_decoder": lambda: transformers.RobertaConfig(**BERT, pad_token_id=1),
}


def make(name, dtype):
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    return noisy(lambda: transformers.AutoModelForCausalLM.from_config(config), dtype)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, precision, tmp_path, monkeypatch):
    if precision == "fp64":
        use_doubles(monkeypatch)
    tolerance = {"rtol": BOUNDS[precision], "atol": BOUNDS[precision]}
    theirs = make(name, DTYPES[precision])
    theirs.save_pretrained(tmp_path / "in")
    with jax.enable_x64(precision == "fp64"):
        ours = interop.load(tmp_path / "in")
        rng = np.random.default_rng(0)
        ids = rng.integers(2, 61, (2, 14))
        mask = np.ones((2, 14), np.int64)
        mask[1, 11:] = 0
        labels = np.where(mask, ids, -100)
        want = theirs(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels),
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
        want.loss.backward()
        out = ours.model.apply(
            {"params": ours.params}, ids, attention_mask=mask, output_hidden_states=True, output_attentions=True
        )
        real = mask.astype(bool)
        close = lambda a, b: np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), **tolerance)
        close(out.logits[real], want.logits[torch.tensor(real)])
        assert len(out.hidden_states) == len(want.hidden_states)
        for a, b in zip(out.hidden_states, want.hidden_states, strict=True):
            close(a[real], b[torch.tensor(real)])
        for a, b in zip(out.attentions, want.attentions, strict=True):
            a, b = (np.moveaxis(np.asarray(x), 2, 1)[real] for x in (a, b.detach().numpy()))
            np.testing.assert_allclose(a, b, **tolerance)

        objective = CausalLM()
        batch = {"input_ids": jnp.asarray(ids), "loss_weights": jnp.asarray(mask)}

        def loss(params):
            prepared = objective.prepare(batch, jax.random.key(0))
            out = ours.model.apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        value, grads = jax.value_and_grad(loss)(ours.params)
        np.testing.assert_allclose(value, want.loss.item(), **tolerance)

        check_gradients(grads, theirs, tmp_path / "grads", BOUNDS[precision])


@pytest.mark.parametrize("name", CONFIGS)
def test_export_loads_in_transformers(name, tmp_path):
    theirs = make(name, torch.float32)
    again = exported(theirs, tmp_path, transformers.AutoModelForCausalLM)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-6)
    assert type(again) is type(theirs)
