"""LoRA equals peft with copied matrices, in both directions, merged and unmerged, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

from llm_jax import interop
from llm_jax.delta import lora
from llm_jax.interop.huggingface import peft as peft_format
from llm_jax.interop.huggingface import peft_config, peft_match
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


def run(base, params):
    return jax.jit(lambda p: base.model.apply({"params": p}, jnp.asarray(IDS)).logits)(params)


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def redraw(parameters):
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.3)


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
def test_their_adapter_here(theirs, tmp_path, rs):
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rs)
    adapted = peft.get_peft_model(theirs, settings)
    redraw(p for name, p in adapted.named_parameters() if "lora_B" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    want = logits_of(adapted)
    loss = adapted(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    loss.backward()
    base = interop.load(tmp_path / "base")
    params = peft_format.load(tmp_path / "adapter", base.model, base.params)
    run = jax.jit(lambda params: base.model.apply({"params": params}, jnp.asarray(IDS)).logits)
    np.testing.assert_allclose(run(params), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(lora.merge(params)), want, rtol=1e-5, atol=1e-5)

    def ours(trainable, frozen):
        logp = jax.nn.log_softmax(run(combine(trainable, frozen))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, jnp.asarray(IDS)[:, 1:, None], axis=-1))

    value, grads = jax.jit(jax.value_and_grad(ours))(*partition(params, lora.TRAINABLE))
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
    want = run(base, params)
    np.testing.assert_allclose(logits_of(adapted), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_of(adapted.merge_and_unload()), want, rtol=1e-5, atol=1e-5)


def test_norms_that_trained_beside_lora_arrive_there(theirs, tmp_path):
    base = interop.load(tmp_path / "base")
    params = lora.attach(base.params, lora.LoraConfig(targets=("query/kernel",), rank=3), jax.random.key(0))
    train = lambda path, x: x + 0.3 * path.endswith(("/b", "scale"))
    params = paths.map_with_path(train, params)
    peft_format.save(tmp_path / "adapter", base.model, params, str(tmp_path / "base"), whole=("*/scale",))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    want = run(base, params)
    np.testing.assert_allclose(logits_of(adapted), want, rtol=1e-5, atol=1e-5)


CLASSES = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "LN_TUNING": peft.LNTuningConfig,
           "TRAINABLE_TOKENS": peft.TrainableTokensConfig}  # fmt: skip


@pytest.mark.parametrize("kind", peft_config.HONOURED)
def test_every_field_of_theirs_is_decided(kind):
    """A field that is in no table is refused unless it is off; its default must then be off."""
    decided = peft_config.HONOURED[kind] | peft_config.NEUTRAL | peft_config.ALLOWED.keys()
    defaults = CLASSES[kind]().to_dict()
    assert {f.name for f in dataclasses.fields(CLASSES[kind])} - defaults.keys() <= peft_config.NEUTRAL
    left = {name: value for name, value in defaults.items() if name not in decided and value not in peft_config.OFF}
    assert not left
    for name, allowed in peft_config.ALLOWED.items():
        assert name not in defaults or defaults[name] in allowed or name == "peft_type"


NAMES = [
    f"{stack}.block.{i}.layer.{j}.{m}"
    for stack in ("encoder", "decoder")
    for i in range(12)
    for j, m in ((0, "SelfAttention.q"), (0, "SelfAttention.k"), (1, "EncDecAttention.q"), (1, "DenseReluDense.wi"))
]
NAMES += [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
NAMES += ["lm_head", "model.norm", "classifier.dense", "classifier", "pre_classifier", "model.embed_tokens"]
SELECTIONS = [
    {"target_modules": ["q", "up_proj"]},
    {"target_modules": ["1.self_attn.q_proj", "lm_head", "dense"], "modules_to_save": ["classifier"]},
    {"target_modules": r".*\.(q|q_proj|wi)", "exclude_modules": r".*\.1[01]\..*"},
    {"target_modules": ["q", "q_proj", "k"], "exclude_modules": ["EncDecAttention.q", "layers.3.self_attn.q_proj"]},
    {"target_modules": ["q", "q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q", "q_proj"], "layers_to_transform": 2, "layers_pattern": ["layers", "block"]},
    {"target_modules": ["q", "q_proj"], "layers_to_transform": [2, 3], "layers_pattern": "block"},
    {"target_modules": ["norm", "embed_tokens", "pre_classifier"], "modules_to_save": ["norm", "head"]},
]  # fmt: skip


@pytest.mark.parametrize("fields", SELECTIONS, ids=str)
def test_modules_are_found_as_theirs_are(fields, tmp_path):
    theirs = peft.LoraConfig(**fields)
    theirs.save_pretrained(tmp_path)
    ours = peft_config.read(epath.Path(tmp_path))
    for name in NAMES:
        found = check_target_module_exists(theirs, name)
        assert peft_match.is_target(ours, name) == (bool(found) and not isinstance(found, _ExcludedModule)), name


NEUTRAL = [
    {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}, {"init_lora_weights": "mica"},
    {"exclude_modules": ["k_proj"]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"fan_in_fan_out": True},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", NEUTRAL, ids=str)
def test_fields_without_effect_leave_their_logits(theirs, tmp_path, options):
    settings = peft.LoraConfig(r=4, target_modules=TARGETS, **options)
    adapted = peft.get_peft_model(theirs, settings)
    redraw(p for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    want = logits_of(peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval())
    base = interop.load(tmp_path / "base")
    params = peft_format.load(tmp_path / "adapter", base.model, base.params)
    np.testing.assert_allclose(run(base, params), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, task", [
    ("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS"), ("QuestionAnswering", "QUESTION_ANS"),
])  # fmt: skip
def test_heads_with_labels_both_ways(theirs, tmp_path, kind, task):
    config = transformers.LlamaConfig(**{**theirs.config.to_dict(), "num_labels": 3, "pad_token_id": 0})
    cls = getattr(transformers, f"LlamaFor{kind}")
    torch.manual_seed(1)
    cls(config).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        cls.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, target_modules=TARGETS, task_type=task)
    ).eval()
    redraw(p for p in adapted.parameters() if p.requires_grad)  # A, B and the head

    def both(model):
        with torch.no_grad():
            out = model(torch.tensor(IDS))
        return (torch.stack([out.start_logits, out.end_logits], -1) if task == "QUESTION_ANS" else out.logits).numpy()

    want = both(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = interop.load(tmp_path / "base")
    params = peft_format.load(tmp_path / "adapter", base.model, base.params)
    np.testing.assert_allclose(run(base, params), want, rtol=1e-5, atol=1e-5)
    peft_format.save(tmp_path / "back", base.model, params, str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "back").eval()
    np.testing.assert_allclose(both(again), want, rtol=1e-5, atol=1e-5)
    assert type(again) is type(adapted)
