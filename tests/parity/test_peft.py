"""LoRA equals peft with copied matrices, in both directions, merged and unmerged, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from llm_jax import interop
from llm_jax.delta import lora
from llm_jax.interop import peft as peft_format
from llm_jax.nn import paths
from llm_jax.training.trainable import combine, partition

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = np.arange(24).reshape(2, 12)


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
def test_their_adapter_here(theirs, tmp_path, rs):
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rs)
    adapted = peft.get_peft_model(theirs, settings)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    want = logits_of(adapted)
    loss = adapted(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    loss.backward()
    base = interop.load(tmp_path / "base")
    params = peft_format.load(tmp_path / "adapter", base.model, base.params)
    run = lambda params: base.model.apply({"params": params}, jnp.asarray(IDS)).logits
    np.testing.assert_allclose(run(params), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(lora.merge(params)), want, rtol=1e-5, atol=1e-5)

    def ours(trainable, frozen):
        logp = jax.nn.log_softmax(run(combine(trainable, frozen))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, jnp.asarray(IDS)[:, 1:, None], axis=-1))

    value, grads = jax.value_and_grad(ours)(*partition(params, lora.TRAINABLE))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    got = dict(paths.flatten(grads))
    assert len(got) == 2 * len(TARGETS)
    names = {"query": "self_attn.q_proj", "value": "self_attn.v_proj", "down": "mlp.down_proj"}
    for path, g in got.items():
        module = next(theirs_ for ours_, theirs_ in names.items() if f"/{ours_}/" in path)
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{path[-1].upper()}.default.weight"
            their = dict(adapted.named_parameters())[name].grad.numpy()
            np.testing.assert_allclose(g[layer], their.T, rtol=1e-5, atol=1e-6, err_msg=path)


def test_our_adapter_there(theirs, tmp_path):
    base = interop.load(tmp_path / "base")
    params = lora.attach(base.params, lora.LoraConfig(targets=("attention/*/kernel",), rank=3), jax.random.key(0))
    noise = lambda path, x: jax.random.normal(jax.random.key(1), x.shape) if path.endswith("/b") else x
    params = paths.map_with_path(noise, params)
    peft_format.save(tmp_path / "adapter", base.model, params, str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    want = base.model.apply({"params": params}, jnp.asarray(IDS)).logits
    np.testing.assert_allclose(logits_of(adapted), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_of(adapted.merge_and_unload()), want, rtol=1e-5, atol=1e-5)
