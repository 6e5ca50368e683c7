"""Deltas of every kind and family in PEFT's folders: what is saved loads bit by bit, and what has no place is named."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, model_params

from llm_jax import interop
from llm_jax.compress.quantize import quantize
from llm_jax.delta import dora, lora, methods, node
from llm_jax.delta.lora import LayeredLora, LoraConfig
from llm_jax.delta.methods import BitFitConfig, DeltaConfig, Ia3Config
from llm_jax.delta.scaled import Biased, Scaled
from llm_jax.interop import InteropError
from llm_jax.interop.huggingface import peft
from llm_jax.interop.merged import merged_difference
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, weights
from llm_jax.storage.safetensors import TensorFolder, metadata, save_file

XLNET = XLNetConfig(vocab_size=31, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10)
LABELS = dataclasses.replace(ENCODERS["bert"], head="classification", labels=("a", "b", "c"))
CONFIGS = {
    **{name: MODELS[name] for name in ("gpt2", "gpt_untied_padded", "llama", "mistral", "qwen2")},
    "qwen3": dataclasses.replace(MODELS["qwen3"], out_bias=False, mlp_bias=False),
    "gpt1": dataclasses.replace(MODELS["gpt1"], hidden_dim=None, activation="gelu_tanh"),
    **ENCODERS,
    "bert_labels": LABELS,
    "bert_choice": dataclasses.replace(LABELS, head="choice"),
    "marian": ENCODER_DECODERS["marian"],
    "t5": ENCODER_DECODERS["t5"],
    "t5_1.1": ENCODER_DECODERS["t5_1.1"],
    "xlnet": XLNET,
}


@functools.cache
def base(name):
    return jax.tree.map(jnp.asarray, model_params(CONFIGS[name]))


def attached(name, config, seed=1, quantized=False):
    """The deltas of a config with random numbers, padding left at zero; nothing is computed but norms of columns."""
    rng = np.random.default_rng(seed)
    params = jax.jit(quantize)(base(name)) if quantized else base(name)
    shapes = jax.eval_shape(lambda p: methods.attach(p, config, jax.random.key(0)), params)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)

    def fill(w, plain):
        if not node.is_delta(w):
            return plain
        fields = {field: draw(getattr(w, field)) for field in w.trains}
        if isinstance(w, LayeredLora):
            real = lora.columns(w.ranks, w.a.shape[-1])
            fields |= {"a": fields["a"] * real[:, None, :], "b": fields["b"] * real[:, :, None]}
            fields["scales"] = jnp.asarray([2.0 / r if r else 0.0 for r in w.ranks], jnp.float32)
        w = w.replace(base=fill(w.base, plain), **fields)
        if not isinstance(w, dora.Dora):
            return w
        squares, real = dora.squares_of(w.base.base), np.array(lora.ranks_of(w.base) or [1]) > 0
        magnitude = w.magnitude if real.all() else jnp.where(real[:, None], w.magnitude, jnp.sqrt(squares))
        return w.replace(squares=squares, magnitude=magnitude)

    return jax.tree.map(fill, shapes, params, is_leaf=weights.is_node)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(paths.flatten(a), paths.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def of(**fields):
    return DeltaConfig(lora=LoraConfig(**{"rank": 2, "alpha": 4.0, **fields}))


MLP = ("mlp/up/kernel", "mlp/down/kernel")
TWO = ("*attention/query/kernel", "mlp/down/kernel")
ROWS = {
    **{(name, "lora"): of() for name in CONFIGS if name != "xlnet"},
    ("xlnet", "lora"): of(targets=MLP),
    **{(name, "layers"): of(targets=("layers[1].mlp.down", "mlp.up"), ranks=("layers[1].mlp.up=3",))
       for name in ("gpt2", "llama", "bert", "albert", "marian", "t5", "xlnet")},
    ("gpt2", "parts in some layers"): of(targets=("layers[0].attention.query", "layers[1].attention.value")),
    ("gpt2", "parts of other ranks"): of(targets=("attention",), ranks=("attention.key=1",),
                                          alphas=("attention.key=2",)),
    **{(name, "dora"): of(targets=TWO, dora=True) for name in ("llama", "bert", "t5")},
    ("gpt2", "dora"): of(targets=("attention",), dora=True),
    ("llama", "dora in a layer"): of(targets=("layers[1].attention.query",), dora=True),
    **{(name, "ia3"): DeltaConfig(ia3=Ia3Config()) for name in CONFIGS if name != "xlnet"},
    ("xlnet", "ia3"): DeltaConfig(ia3=Ia3Config(outputs=("mlp/up/kernel",))),
    **{(name, "rows"): DeltaConfig(token_rows=(3, 7)) for name in ("gpt2", "mistral", "distilbert", "t5")},
    **{(name, "lora and rows"): dataclasses.replace(of(targets=TWO), token_rows=(3, 7))
       for name in ("gpt2", "qwen2", "distilbert", "marian", "t5", "bert_labels")},
    ("mistral", "table"): of(targets=("embed/embedding", "attention.query")),
    ("llama", "tied table"): of(targets=("embed/embedding",)),
    ("gpt_untied_padded", "padded table and head"): of(targets=("embed/embedding", "head/kernel")),
    ("bert", "positions"): of(targets=("positions/embedding",)),
    ("llama", "a bias beside LoRA"): dataclasses.replace(of(), bitfit=BitFitConfig()),
}  # fmt: skip


@pytest.mark.parametrize("name, kind", ROWS, ids=lambda x: x.replace(" ", "_"))
def test_what_is_saved_loads_bit_by_bit(name, kind, tmp_path):
    params, model = attached(name, ROWS[name, kind]), CONFIGS[name].make()
    if kind == "padded table and head":  # what no token reads is not stored
        table, head = params["embed"], params["head"]
        table["embedding"] = table["embedding"].replace(a=table["embedding"].a.at[31:].set(0))
        head["kernel"] = head["kernel"].replace(b=head["kernel"].b.at[:, 31:].set(0))
    peft.save(tmp_path, model, params)
    same(peft.load(tmp_path, model, base(name)), params)


def test_over_an_int8_base(tmp_path):
    params, model = attached("gpt2", of(), quantized=True), CONFIGS["gpt2"].make()
    peft.save(tmp_path, model, params)
    same(peft.load(tmp_path, model, jax.jit(quantize)(base("gpt2"))), params)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def targets(name, config, folder, **options):
    peft.save(folder, CONFIGS[name].make(), attached(name, config), **options)
    return config_of(folder)


def test_names_are_the_shortest_that_are_clear(tmp_path):
    """BERT has three layers called dense and a pooler's; only the chosen ones may match."""
    chosen = of(targets=("attention/out/kernel", "mlp/up/kernel"))
    found = targets("bert", chosen, tmp_path / "a")["target_modules"]
    assert found == ["attention.output.dense", "intermediate.dense"]
    some = targets("llama", of(targets=("layers[1].attention.query",)), tmp_path / "b")
    assert some["target_modules"] == ["1.self_attn.q_proj"]
    assert targets("t5", of(targets=("mlp/down/kernel",)), tmp_path / "c")["target_modules"] == ["wo"]
    ranks = targets("llama", ROWS["llama", "layers"], tmp_path / "d")
    assert ranks["rank_pattern"] == {"1.mlp.up_proj": 3} and ranks["r"] == 2
    ia3 = targets("bert", DeltaConfig(ia3=Ia3Config()), tmp_path / "e")
    assert ia3["feedforward_modules"] == ["0.output.dense", "1.output.dense", "2.output.dense"]
    assert {"key", "value"} < set(ia3["target_modules"])


@pytest.mark.parametrize("name, pattern", [
    ("mistral", "all-linear"), ("gpt2", "all-linear"), ("bert", r".*\.(query|key|value|dense)"), ("t5", "all-linear"),
])  # fmt: skip
def test_targets_by_expression(name, pattern, tmp_path):
    chosen = of() if name != "bert" else of(targets=("attention", "mlp.up", "mlp.down", "head.transform", "pooler"))
    model, params = CONFIGS[name].make(), attached(name, chosen)
    peft.save(tmp_path, model, params)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**config_of(tmp_path), "target_modules": pattern}))
    same(peft.load(tmp_path, model, base(name)), params)


def test_fused_projections_share_a_or_stand_side_by_side(tmp_path):
    """Theirs is one matrix: the sum over parts is the same whichever way it is stored."""
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", of(targets=("attention",)))
    peft.save(tmp_path / "apart", model, params)
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_"
    stored = TensorFolder(tmp_path / "apart" / peft.FILE)
    assert stored[f"{name}A.weight"].shape == (6, 12) and stored[f"{name}B.weight"].shape == (36, 6)
    config = config_of(tmp_path / "apart")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 12.0, {"c_proj": 2})
    nodes = params["decoder"]["layers"]["attention"]
    update = np.concatenate([nodes[k]["kernel"].a[1] @ nodes[k]["kernel"].b[1] for k in ("query", "key", "value")], 1)
    np.testing.assert_allclose((stored[f"{name}B.weight"] @ stored[f"{name}A.weight"]).T, update, rtol=1e-5, atol=1e-5)
    for part in ("key", "value"):
        nodes[part]["kernel"] = nodes[part]["kernel"].replace(a=nodes["query"]["kernel"].a)
    peft.save(tmp_path / "shared", model, params)
    assert TensorFolder(tmp_path / "shared" / peft.FILE)[f"{name}A.weight"].shape == (2, 12)
    assert "llm_jax.parts" not in metadata(tmp_path / "shared" / peft.FILE)
    same(peft.load(tmp_path / "shared", model, base("gpt2")), params)


def test_a_fused_file_without_our_note_is_read_as_one_layer(tmp_path):
    """PEFT writes no note, nor keeps ours: every part then has all columns, and the same product."""
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", of(targets=("attention.query", "attention.value")))
    peft.save(tmp_path, model, params)
    save_file({n: np.array(x) for n, x in TensorFolder(tmp_path / peft.FILE).items()}, str(tmp_path / peft.FILE))
    again = peft.load(tmp_path, model, base("gpt2"))["decoder"]["layers"]["attention"]
    for part in ("query", "key", "value"):
        plain = params["decoder"]["layers"]["attention"][part]["kernel"]
        assert again[part]["kernel"].a.shape[-1] == 4
        np.testing.assert_allclose(again[part]["kernel"].dense(), weights.dense(plain), rtol=1e-5, atol=1e-5)


def test_a_damaged_note_of_parts_is_one_line(tmp_path):
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", of(targets=("attention.query",)))
    peft.save(tmp_path, model, params)
    stored = {n: np.array(x) for n, x in TensorFolder(tmp_path / peft.FILE).items()}
    save_file(stored, str(tmp_path / peft.FILE), metadata={"llm_jax.parts": "{"})
    with pytest.raises(InteropError, match="its note llm_jax.parts is damaged"):
        peft.load(tmp_path, model, base("gpt2"))


def test_parts_of_other_scales_are_stored_exactly_to_rounding(tmp_path):
    model = CONFIGS["gpt2"].make()
    params = attached("gpt2", of(targets=("attention",)))
    nodes = params["decoder"]["layers"]["attention"]
    nodes["key"]["kernel"] = nodes["key"]["kernel"].replace(scale=0.3)
    peft.save(tmp_path, model, params)
    again = peft.load(tmp_path, model, base("gpt2"))["decoder"]["layers"]["attention"]
    for part in ("query", "key", "value"):
        np.testing.assert_allclose(again[part]["kernel"].dense(), nodes[part]["kernel"].dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_start_out_of_the_base_is_stored_against_the_original(name, start, tmp_path):
    """What the start took out is a difference of rank r: stored at rank 2r, read over the original."""
    model, config = CONFIGS[name].make(), of(targets=TWO, start=start)
    started = jax.jit(lambda p: methods.attach(p, config, jax.random.key(0)))(base(name))
    moved = paths.map_with_path(lambda path, x: x + 0.1 if path.endswith("/b") else x, started)
    peft.save(tmp_path, model, moved, original=base(name))
    assert config_of(tmp_path)["r"] == 4 or name == "gpt2"
    back, want = peft.load(tmp_path, model, base(name)), dict(paths.flatten(node.merge(moved)))
    for path, x in paths.flatten(node.merge(back)):
        np.testing.assert_allclose(x, want[path], rtol=1e-5, atol=2e-6, err_msg=path)
    wrong = paths.map_with_path(lambda path, x: x + 0.1 * np.sin(np.arange(x.size).reshape(x.shape) ** 2), base(name))
    with pytest.raises(InteropError, match="differs from the original by more than rank 2"):
        peft.save(tmp_path, model, moved, original=wrong)


def test_pissa_of_theirs_is_rebuilt_from_the_base_or_refused(tmp_path):
    model, params = CONFIGS["llama"].make(), attached("llama", of(targets=("attention.query",)))
    peft.save(tmp_path, model, params)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**config_of(tmp_path), "init_lora_weights": "pissa"}))
    found = peft.load(tmp_path, model, base("llama"))["decoder"]["layers"]["attention"]["query"]["kernel"]
    first = base("llama")["decoder"]["layers"]["attention"]["query"]["kernel"]
    for layer in (0, 1):
        u, s, v = np.linalg.svd(np.asarray(first[layer], np.float64))
        np.testing.assert_allclose(found.base[layer], (u[:, 2:] * s[2:]) @ v[2:], rtol=1e-4, atol=1e-5)
    plain = jax.tree.map(lambda x: x, base("llama"))
    plain["decoder"]["layers"]["attention"]["query"]["kernel"] = jnp.broadcast_to(jnp.eye(12), (2, 12, 12))
    with pytest.raises(InteropError, match="equal singular values 2 and 3"):
        peft.load(tmp_path, model, plain)
    with pytest.raises(InteropError, match="needs the plain matrix of .*q_proj, not Quantized"):
        peft.load(tmp_path, model, jax.jit(quantize)(base("llama")))


@pytest.mark.parametrize("patterns, bias, names", [
    (("*bias",), "all", {"attn.c_attn.base_layer.bias", "attn.c_proj.bias", "ln_1.bias"}),
    (("*query/bias", "*key/bias", "*value/bias"), "lora_only", {"attn.c_attn.base_layer.bias"}),
    (("*attention/out/bias",), "none", {"attn.c_proj.weight", "attn.c_proj.bias"}),
])  # fmt: skip
def test_biases_that_trained_beside_lora(patterns, bias, names, tmp_path):
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", of(targets=("attention.query", "attention.key")))
    trained = paths.map_with_path(lambda path, x: x + 1 if path.endswith("bias") else x, params)
    chosen = paths.matcher(patterns)
    peft.save(tmp_path, model, trained, whole=patterns)
    assert config_of(tmp_path)["bias"] == bias
    assert {f"base_model.model.transformer.h.1.{n}" for n in names} <= set(TensorFolder(tmp_path / peft.FILE))
    want = paths.map_with_path(lambda path, x: x + 1 if chosen(path) else x, params)
    same(peft.load(tmp_path, model, base("gpt2")), want)
    if bias == "all":
        stored = {n: np.array(x) for n, x in TensorFolder(tmp_path / peft.FILE).items() if "h.1.ln_2.bias" not in n}
        save_file(stored, str(tmp_path / peft.FILE))
        with pytest.raises(InteropError, match="lacks base_model.model.transformer.h.1.ln_2.bias"):
            peft.load(tmp_path, model, base("gpt2"))


def test_tuned_norms_alone(tmp_path):
    model, patterns = CONFIGS["bert_labels"].make(), methods.NORMS
    change = lambda path, x: x + 1 if paths.matcher((*patterns, "classifier/*"))(path) else x
    trained = paths.map_with_path(change, base("bert_labels"))
    peft.save(tmp_path, model, trained, whole=patterns)
    config = config_of(tmp_path)
    assert (config["peft_type"], config["target_modules"]) == ("LN_TUNING", ["LayerNorm"])
    assert config["modules_to_save"] == ["classifier", "pooler.dense"]
    same(peft.load(tmp_path, model, base("bert_labels")), trained)


def test_a_head_with_labels_takes_its_pooler_along(tmp_path):
    """A base of language modelling has no pooler: a head without it would read a fresh one."""
    params, model = attached("bert_labels", of(targets=TWO)), CONFIGS["bert_labels"].make()
    peft.save(tmp_path, model, params)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "pooler.dense"]
    other = {**base("bert_labels")}
    other |= {part: jax.tree.map(lambda x: x + 1, other[part]) for part in ("classifier", "pooler")}
    same(peft.load(tmp_path, model, other), params)


def test_copies_of_a_tied_table_must_agree(tmp_path):
    model, params = CONFIGS["llama"].make(), attached("llama", of(targets=("embed/embedding",)))
    peft.save(tmp_path, model, params)
    assert config_of(tmp_path)["ensure_weight_tying"] is True
    stored = {n: np.array(x) for n, x in TensorFolder(tmp_path / peft.FILE).items()}
    save_file({n: x + ("lm_head.lora_B" in n) for n, x in stored.items()}, str(tmp_path / peft.FILE))
    with pytest.raises(InteropError, match="share a table and have different LoRAs"):
        peft.load(tmp_path, model, base("llama"))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**config_of(tmp_path), "ensure_weight_tying": False}))
    with pytest.raises(InteropError, match="unties the output layer lm_head from model.embed_tokens"):
        peft.load(tmp_path, model, base("llama"))
    rows = attached("llama", dataclasses.replace(of(), token_rows=(3,)))
    peft.save(tmp_path, model, rows)
    table = np.array(base("llama")["embed"]["embedding"])
    good = {n: np.array(x) for n, x in TensorFolder(tmp_path / peft.FILE).items()}
    for name, extra, message in (
        ("lm_head.token_adapter.trainable_tokens_delta", np.zeros((1, 12), np.float32), "unties .*lm_head"),
        ("lm_head.weight", table + 1, "unties base_model.model.lm_head.weight"),
    ):
        save_file(good | {f"base_model.model.{name}": extra}, str(tmp_path / peft.FILE))
        with pytest.raises(InteropError, match=message):
            peft.load(tmp_path, model, base("llama"))
    save_file(good | {"base_model.model.lm_head.weight": table}, str(tmp_path / peft.FILE))
    same(peft.load(tmp_path, model, base("llama")), rows)


def scaled(name, path):
    """IA3 around the LoRA of a model."""
    wrap = lambda p, w: Scaled(w, jnp.ones(w.shape[:1] + w.shape[-1:])) if p.endswith(path) else w
    return paths.map_with_path(wrap, attached(name, of(targets=TWO)), is_leaf=weights.is_node)


both = lambda: methods.attach_ia3(attached("llama", of(targets=("attention.query",))))
NO_PLACE = {
    "another node": ("gpt2", lambda: {**attached("gpt2", of()), "port": np.ones(3)}, "port have no place in PEFT's"),
    "xlnet attention": ("xlnet", lambda: attached("xlnet", of()), "attention/key/kernel"),
    "t5 table": ("t5", lambda: attached("t5", of(targets=("embed/embedding",))), "lookups read copies of shared"),
    "marian table": ("marian", lambda: attached("marian", of(targets=("embed/embedding",))), "lookups read copies"),
    "marian rows": ("marian", lambda: attached("marian", DeltaConfig(token_rows=(3,))), "PEFT cannot run them"),
    "rows beside a bias": ("bert", lambda: attached("bert", DeltaConfig(token_rows=(3,))), "PEFT leaves out the bias"),
    "rows and labels": ("bert_labels", lambda: attached("bert_labels", DeltaConfig(token_rows=(3,))), "need LoRA in"),
    "ia3 around lora": ("llama", lambda: scaled("llama", "query/kernel"), "IA3 around LoRA on"),
    "ia3 beside lora": ("llama", both, "beside LoRA on decoder/layers/attention/query/kernel has no place"),
    "biases alone": ("llama", lambda: attached("llama", DeltaConfig(bitfit=BitFitConfig())), "bias on decoder/layers"),
    "ia3 on inputs of a part": (
        "gpt2", lambda: attached("gpt2", DeltaConfig(ia3=Ia3Config((), ("attention/key/kernel",)))), "factors differ"),
    "dora on a tied table": (
        "llama", lambda: attached("llama", of(targets=("embed/embedding",), dora=True)), "shares the table"),
    "half dora": ("llama", lambda: paths.map_with_path(
        lambda p, w: w.base if p.endswith("query/kernel") else w, attached("llama", of(targets=TWO, dora=True)),
        is_leaf=weights.is_node), "DoRA on all modules with LoRA or on none"),
    "half biased": ("llama", lambda: paths.map_with_path(
        lambda p, w: Biased(w, jnp.zeros((2, 12))) if p.endswith("query/kernel") else w,
        attached("llama", of(targets=TWO)), is_leaf=weights.is_node), "lora_bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PLACE)
def test_deltas_without_a_place_are_refused_by_name(case, tmp_path):
    name, make, message = NO_PLACE[case]
    with pytest.raises(InteropError) as error:
        peft.save(tmp_path, CONFIGS[name].make(), make())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / peft.FILE).exists()


@pytest.mark.parametrize("name, patterns, message", [
    ("gpt2", ("*bias",), "have no place in PEFT's format without LoRA beside them"),
    ("llama", (), "there is no LoRA or other delta"),
    ("bert_labels", ("classifier/*",), "there is no LoRA or other delta"),
    ("llama", ("a_typo/kernel",), "pattern 'a_typo/kernel' matches no parameter"),
    ("llama", ("embed/embedding",), "cannot store a table that the output layer shares"),
    ("t5", ("embed/embedding",), "cannot store a table that the output layer shares"),
])  # fmt: skip
def test_what_trained_without_a_delta(name, patterns, message, tmp_path):
    with pytest.raises(InteropError, match=message):
        peft.save(tmp_path, CONFIGS[name].make(), base(name), whole=patterns)


def test_an_original_without_effect_is_refused(tmp_path):
    with pytest.raises(InteropError, match="original has no effect on IA3"):
        peft.save(
            tmp_path, CONFIGS["gpt2"].make(), attached("gpt2", DeltaConfig(ia3=Ia3Config())), original=base("gpt2")
        )


def test_an_adapter_of_another_base(tmp_path):
    peft.save(tmp_path, CONFIGS["llama"].make(), attached("llama", of(targets=TWO)))
    other = dataclasses.replace(CONFIGS["llama"], model_dim=24)
    with pytest.raises(InteropError, match=r"has shape \[2, 12\], expected \[2, 24\]"):
        peft.load(tmp_path, other.make(), model_params(other))
    with pytest.raises(InteropError, match="carries IA3 already"):
        peft.load(
            tmp_path, CONFIGS["llama"].make(), attached("llama", DeltaConfig(ia3=Ia3Config(("attention.query",))))
        )


def test_factors_and_biases_are_in_a_folder_of_the_whole_model(tmp_path):
    """Their dense matrices alone would leave a scaled or shifted bias behind."""
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", DeltaConfig(ia3=Ia3Config()))
    interop.save(tmp_path, model, params)
    assert merged_difference(model, params, interop.load(tmp_path).params) < 1e-4
    with pytest.raises(InteropError, match="a bias cannot be merged into a module that has none"):
        interop.save(tmp_path, CONFIGS["llama"].make(), attached("llama", DeltaConfig(bitfit=BitFitConfig())))


def test_merged_difference():
    model, params = CONFIGS["gpt2"].make(), attached("gpt2", of(targets=TWO))
    merged = node.merge(params)
    assert 0 < merged_difference(model, params, merged) < 1e-4
    assert merged_difference(model, params, base("gpt2")) > 0.1
