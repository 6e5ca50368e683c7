"""PEFT folders, both ways: the same A and B under PEFT's names and layout, and every misfit named."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import noise

from llm_jax.compress.quantize import Quantized, quantize
from llm_jax.delta import lora
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.interop import InteropError
from llm_jax.interop.huggingface import peft, peft_config
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import unstack
from llm_jax.storage.safetensors import TensorFolder, save_file

LLAMA = LlamaConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40, tied=False)  # fmt: skip
MODEL = LLAMA.make()
PREFIX = "base_model.model.model.layers."


@functools.cache
def base():
    return noise(MODEL, 1.0)


def attached(**changes):
    """LoRA with random A and B, made by numpy: nothing to compile."""
    rng = np.random.default_rng(1)
    config = LoraConfig(**{"rank": 3, "alpha": 6.0, **changes})
    shapes = jax.eval_shape(lambda params: lora.attach(params, config, jax.random.key(0)), base())
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    fill = lambda s, w: s.replace(base=w, a=draw(s.a), b=draw(s.b)) if isinstance(s, Lora) else w
    return jax.tree.map(fill, shapes, base(), is_leaf=lambda x: isinstance(x, Lora))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(paths.flatten(a), paths.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


ROWS = [{}, {"targets": ("query/kernel", "head/kernel")}, {"dropout": 0.25}, {"rank": 10, "rs": True}, {"rank": 1}]


@pytest.mark.parametrize("changes", ROWS, ids=str)
def test_round_trip(changes, tmp_path):
    params = attached(**changes)
    peft.save(tmp_path, MODEL, params, "org/base")
    same(peft.load(tmp_path, MODEL, base()), params)
    peft.save(tmp_path, MODEL, unstack(params))
    same(peft.load(tmp_path, MODEL, unstack(base())), params)


def test_names_layout_and_config(tmp_path):
    params = attached(targets=("query/kernel", "mlp/down/kernel", "head/kernel"), dropout=0.5)
    peft.save(tmp_path, MODEL, params, "org/base")
    stored, layers = dict(TensorFolder(tmp_path)), params["decoder"]["layers"]
    want = {"base_model.model.lm_head": (params["head"]["kernel"].a, params["head"]["kernel"].b)}
    for i in (0, 1):
        for ours, theirs in (
            (layers["attention"]["query"], "self_attn.q_proj"),
            (layers["mlp"]["down"], "mlp.down_proj"),
        ):
            want[f"{PREFIX}{i}.{theirs}"] = (ours["kernel"].a[i], ours["kernel"].b[i])
    assert stored.keys() == {f"{n}.lora_{s}.weight" for n in want for s in "AB"}
    for name, (a, b) in want.items():
        np.testing.assert_array_equal(stored[f"{name}.lora_A.weight"], np.asarray(a).T)  # [r, in]
        np.testing.assert_array_equal(stored[f"{name}.lora_B.weight"], np.asarray(b).T)  # [out, r]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "lm_head", "q_proj"]
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6.0, "lora_dropout": 0.5,
                "use_rslora": False, "bias": "none", "base_model_name_or_path": "org/base"}  # fmt: skip
    assert expected.items() <= config.items()


def test_over_an_int8_base(tmp_path):
    peft.save(tmp_path, MODEL, attached())
    eight = jax.jit(quantize)(base())
    found = peft.load(tmp_path, MODEL, eight)
    node = found["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(node, Lora) and isinstance(node.base, Quantized)
    same(lora.detach(found), eight)


def folder(path, config=None, tensors=None, drop=()):
    """A good folder with something changed."""
    peft.save(path, MODEL, attached(targets=("query/kernel",)))
    file = path / "adapter_config.json"
    file.write_text(
        json.dumps({k: v for k, v in {**json.loads(file.read_text()), **(config or {})}.items() if v != "drop"})
    )
    stored = {n: np.array(a) for n, a in TensorFolder(path).items()} | (tensors or {})
    save_file({n: a for n, a in stored.items() if not any(d in n for d in drop)}, path / peft.FILE)
    return path


def test_rank_stabilised_files(tmp_path):
    loaded = peft.load(folder(tmp_path, {"use_rslora": True, "lora_alpha": 5}), MODEL, base())
    assert loaded["decoder"]["layers"]["attention"]["query"]["kernel"].scale == 5 / 3**0.5


REFUSED = {
    "layer_replication": [[0, 2], [1, 2]], "alora_invocation_tokens": [2, 7], "use_qalora": True,
    "use_bdlora": {"nblocks": 2}, "kasa_config": {"a": 1}, "target_parameters": ["mlp.experts"],
    "velora_config": {"rank": 1}, "megatron_config": {"a": 1}, "arrow_config": {"top_k": 1},
    "monteclora_config": {"a": 1}, "bias": "some", "a_field_of_tomorrow": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "field, value", [*REFUSED.items(), *(("init_lora_weights", x) for x in ("pissa_niter_4", "corda", "loftq"))]
)
def test_fields_that_nobody_honours_are_refused_by_name(field, value, tmp_path):
    with pytest.raises(InteropError, match=f"{field}=.* is not supported"):
        peft.load(folder(tmp_path, {field: value}), MODEL, base())


def test_fields_that_change_nothing_are_accepted(tmp_path):
    off = dict.fromkeys(REFUSED, None) | {"use_dora": False, "bias": "none", "loftq_config": {}, "eva_config": {}}
    said = {"init_lora_weights": "gaussian", "fan_in_fan_out": True, "peft_version": "0.99", "qalora_group_size": 16,
            "exclude_modules": ["k_proj"], "layers_to_transform": [0, 1], "task_type": None}  # fmt: skip
    path = folder(tmp_path, {**off, **said})
    save_file({"lm_head.weight": np.ones(1)}, path / "model.safetensors")  # a model beside it is not the adapter
    loaded = peft.load(path, MODEL, base())
    assert isinstance(loaded["decoder"]["layers"]["attention"]["query"]["kernel"], Lora)


@pytest.mark.parametrize("head, task, saved", [
    ("classification", "SEQ_CLS", {"score.weight"}),
    ("tokens", "TOKEN_CLS", {"score.weight", "score.bias"}),
    ("span", "QUESTION_ANS", {"qa_outputs.weight", "qa_outputs.bias"}),
])  # fmt: skip
def test_a_head_with_labels_is_stored_whole(head, task, saved, tmp_path):
    model = dataclasses.replace(LLAMA, head=head, labels=("a", "b", "c")).make()
    trained = noise(model, 1.0)
    query = trained["decoder"]["layers"]["attention"]["query"]
    query["kernel"] = attached()["decoder"]["layers"]["attention"]["query"]["kernel"].replace(base=query["kernel"])
    peft.save(tmp_path, model, trained)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task and config["target_modules"] == ["q_proj"]
    assert {name.split(".")[0] for name in saved} & set(config["modules_to_save"])
    stored = set(TensorFolder(tmp_path))
    assert {n for n in stored if "lora" not in n} == {f"base_model.model.{name}" for name in saved}
    fresh = {**lora.detach(trained), "classifier": jax.tree.map(lambda x: x + 1, trained["classifier"])}
    same(peft.load(tmp_path, model, fresh), trained)
    with pytest.raises(InteropError, match="without a home.*the base has head='lm'"):
        peft.load(tmp_path, MODEL, base())
    save_file({n: np.array(a) for n, a in TensorFolder(tmp_path).items() if "lora" in n}, tmp_path / peft.FILE)
    with pytest.raises(InteropError, match="lacks base_model.model.(score|qa_outputs)"):
        peft.load(tmp_path, model, fresh)


def test_what_trained_beside_lora_is_stored_whole(tmp_path):
    """A bias takes its kernel along, and LoRA on that kernel is merged: PEFT stores a module whole or by matrices."""
    model = dataclasses.replace(LLAMA, mlp_bias=True, qkv_bias=True, out_bias=True).make()
    trained = noise(model, 1.0)
    layers, nodes = trained["decoder"]["layers"], attached()["decoder"]["layers"]
    for path in (("attention", "query"), ("mlp", "up")):
        (part, name), kernel = path, layers[path[0]][path[1]]["kernel"]
        layers[part][name]["kernel"] = nodes[part][name]["kernel"].replace(base=kernel)
    peft.save(tmp_path, model, trained, whole=("final_norm/scale", "mlp/up/bias"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["target_modules"]) == (["model.norm", "up_proj"], ["q_proj"])
    other = noise(model, 0.5, seed=1)
    loaded = peft.load(tmp_path, model, other)
    up = loaded["decoder"]["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(loaded["final_norm"]["scale"], trained["final_norm"]["scale"])
    np.testing.assert_array_equal(up["bias"], layers["mlp"]["up"]["bias"])
    np.testing.assert_allclose(up["kernel"], weights.dense(layers["mlp"]["up"]["kernel"]), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(
        loaded["decoder"]["layers"]["mlp"]["down"]["bias"], other["decoder"]["layers"]["mlp"]["down"]["bias"]
    )
    padded = dataclasses.replace(LLAMA, vocab_pad_multiple=8).make()
    params = {**attached(), "embed": {"embedding": np.pad(np.ones((31, 24), np.float32), ((0, 1), (0, 0)))}}
    peft.save(tmp_path / "padded", padded, params, whole=("embed/embedding",))
    assert TensorFolder(tmp_path / "padded")["base_model.model.model.embed_tokens.weight"].shape == (31, 24)
    with pytest.raises(InteropError, match="all modules with LoRA are stored whole"):
        peft.save(tmp_path, MODEL, attached(), whole=("*/kernel",))
    tied = dataclasses.replace(LLAMA, tied=True).make()
    with pytest.raises(InteropError, match="cannot store a table that the output layer shares"):
        params = {name: part for name, part in attached().items() if name != "head"}
        peft.save(tmp_path, tied, params, whole=("embed/embedding",))


def test_other_modules_stored_whole_take_the_place_of_the_base(tmp_path):
    new = np.arange(24, dtype=np.float32)
    path = folder(tmp_path / "norm", {"modules_to_save": ["model.norm"]}, {"base_model.model.model.norm.weight": new})
    np.testing.assert_array_equal(peft.load(path, MODEL, base())["final_norm"]["scale"], new)
    tied = dataclasses.replace(LLAMA, tied=True).make()
    table = {"base_model.model.model.embed_tokens.weight": np.ones((31, 24), np.float32)}
    path = folder(tmp_path / "table", {"modules_to_save": ["embed_tokens"]}, table)
    with pytest.raises(InteropError, match="unties the output layer"):
        peft.load(path, tied, noise(tied, 1.0))


def wrong(name, shape, value=1.0):
    return {"tensors": {f"{PREFIX}{name}.weight": np.full(shape, value, np.float32)}}


ERRORS = [
    ({"config": {"peft_type": "VERA"}}, "peft_type='VERA' is not supported; there are LORA, IA3, LN_TUNING, TRAINABLE"),
    ({"config": {"peft_type": "IA3"}}, "lora_alpha=6.0 is not supported"),
    ({"config": {"use_dora": True}}, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ({"config": {"lora_bias": True}}, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"),
    ({"config": {"trainable_token_indices": [1]}}, "lacks base_model.model.model.embed_tokens.token_adapter"),
    ({"config": {"trainable_token_indices": [1, 1]}}, "trained tokens 1, 1 must be different numbers from 0 to 30"),
    ({"config": {"trainable_token_indices": [31]}}, "trained tokens 31 must be different numbers from 0 to 30"),
    ({"config": {"trainable_token_indices": {"nothing": [3]}}}, "trained tokens of 'nothing' are not rows of a table"),
    ({"config": {"modules_to_save": ["down_proj"]}}, "lacks base_model.model.model.layers.0.mlp.down_proj.weight"),
    ({"config": {"rank_pattern": {"1.self_attn.q_proj": 4}}}, "1.self_attn.q_proj.lora_A.weight has shape"),
    ({"config": {"target_modules": "drop"}}, "lacks or misstates 'target_modules'"),
    ({"config": {"target_modules": ["q_proj", "v_proj"]}}, "layers.0.self_attn.v_proj.lora_A.weight"),
    ({"config": {"target_modules": ["q_proj", "x_proj"]}}, "names 'x_proj', which is not a module"),
    ({"config": {"target_modules": "q_proj("}}, "lacks or misstates 'q_proj(', which is not a regular expression"),
    ({"config": {"alpha_pattern": {"[": 2}}}, "lacks or misstates '[', which is not a regular expression"),
    ({"config": {"modules_to_save": "score"}}, "modules_to_save='score', which is not a list"),
    ({"config": {"use_dora": True, "lora_bias": True}}, "lora_bias: PEFT has none with use_dora"),
    ({"config": {"layers_to_transform": [2]}}, "leaves no linear layer"),
    ({"config": {"layers_to_transform": [0]}}, "without a home: base_model.model.model.layers.1.self_attn.q_proj"),
    ({"config": {"r": "drop"}}, "lacks or misstates 'r'"),
    ({"config": {"lora_alpha": None}}, "lacks or misstates"),
    ({"config": {"r": 0}}, "rank=0 must be at least 1"),
    ({"config": {"r": 4}}, "0.self_attn.q_proj.lora_A.weight has shape [3, 24], expected [4, 24]"),
    (wrong("1.self_attn.q_proj.lora_A", (3, 25)), "q_proj.lora_A.weight has shape [3, 25], expected [3, 24]"),
    (wrong("1.self_attn.q_proj.lora_B", (23, 3)), "q_proj.lora_B.weight has shape [23, 3], expected [24, 3]"),
    ({"drop": ("0.self_attn.q_proj",)}, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ({"drop": ("1.self_attn.q_proj.lora_B",)}, "lacks base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"),
    (wrong("0.self_attn.q_proj.lora_magnitude", (24,)), "tensors without a home"),
    (wrong("0.self_attn.x_proj.lora_A", (3, 24)), "tensors without a home"),
    (wrong("0.self_attn.q_proj.lora_A", (3, 24), np.nan), "q_proj.lora_A.weight holds numbers that are not finite"),
    (wrong("0.self_attn.q_proj.lora_B", (24, 3), np.inf), "q_proj.lora_B.weight holds numbers that are not finite"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", ERRORS)
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    with pytest.raises(InteropError) as error:
        peft.load(folder(tmp_path, **changes), MODEL, base())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_errors(tmp_path):
    def mixed():
        params = attached(targets=("query/kernel", "key/kernel"))
        attention = params["decoder"]["layers"]["attention"]
        attention["key"]["kernel"] = attention["key"]["kernel"].replace(dropout=0.5)
        return params

    good = folder(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    gpt = GPTConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4).make()
    rows = [
        (lambda: peft.load(tmp_path, MODEL, base()), "adapter_config.json is missing"),
        (lambda: peft.load(tmp_path / "bad", MODEL, base()), "is not an adapter config"),
        (lambda: peft.load(good, MODEL, attached()), "query/kernel carries LoRA already"),
        (lambda: peft.load(good, gpt, noise(gpt, 1.0)), "tensors without a home"),
        (lambda: peft.save(tmp_path, MODEL, base()), "there is no LoRA"),
        (lambda: peft.save(tmp_path, MODEL, mixed()), "LoRA nodes differ in dropout: [0.0, 0.5]"),
    ]
    for call, message in rows:
        with pytest.raises(InteropError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


JUNK = (None, "x", 3, -1, 0.5, True, [], {}, [None], ["q_proj", 5], {"a": None}, {"q_proj": "x"}, [[1]], "(")


@pytest.mark.parametrize("kind", peft_config.HONOURED)
def test_junk_in_any_field_is_one_line(kind, tmp_path):
    path = folder(tmp_path)
    good = {**json.loads((path / "adapter_config.json").read_text()), "peft_type": kind, "token_indices": [1]}
    fields = {*peft_config.HONOURED[kind], *peft_config.ALLOWED, *peft_config.NEUTRAL}
    for field in sorted(fields):
        for junk in JUNK:
            allowed = {k: v for k, v in good.items() if k in fields}
            (path / "adapter_config.json").write_text(json.dumps({**allowed, field: junk}))
            try:
                peft.load(path, MODEL, base())
            except InteropError as e:
                assert "\n" not in str(e)
