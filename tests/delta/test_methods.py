"""Methods of delta tuning on every family, pairwise; `tests/parity/test_delta_matrix.py` has the whole table."""

import delta_cells
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cells import CHECKS, FAMILIES, FEW, METHODS

from llm_jax.delta import describe, lora, methods, node
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.delta.methods import BitFitConfig, DeltaConfig, Ia3Config
from llm_jax.models import parameters
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.nn import paths


def test_every_method_and_family_has_a_cell():
    assert {m for m, _, _ in FEW} == set(METHODS) and {f for _, f, _ in FEW} == set(FAMILIES)


@pytest.mark.parametrize("method", ["pissa", "ia3"])
def test_what_no_integer_base_carries(method):
    with pytest.raises(ValueError, match=delta_cells.impossible(method, "int8")):
        delta_cells.attached(method, "gpt2", "int8")


@pytest.mark.parametrize("method, family, base", FEW)
def test_cells(method, family, base):
    for name, check in CHECKS.items():
        if name != "merge" or METHODS[method].merges:
            check(method, family, base)
    if family in delta_cells.DECODERS:
        delta_cells.check_decoding(method, family, base)


def abstract(config):
    return parameters.declared(config)[0]


def sizes(config, delta):
    made = jax.eval_shape(lambda p: methods.attach(p, delta, jax.random.key(0)), abstract(config))
    return describe.sizes(made, methods.trainable(made, delta))


def test_published_counts():
    """GPT-2 medium, r=4 on query and value (Hu et al. 2021, table 3); RoBERTa base, r=8 on both (their table 2)."""
    medium = GPTConfig(model_dim=1024, num_layers=24, num_heads=16)
    two = ("attention.query", "attention.value")
    assert sizes(medium, DeltaConfig(LoraConfig(targets=two, rank=4))).trainable == 393_216
    base = BertConfig(vocab_size=50265, model_dim=768, num_layers=12, num_heads=12, hidden_dim=3072)
    assert sizes(base, DeltaConfig(LoraConfig(targets=two, rank=8))).trainable == 294_912
    assert sizes(base, DeltaConfig(bitfit=BitFitConfig())).trainable == sum(
        x.size for p, x in paths.flatten(abstract(base)) if p.endswith("bias")
    )
    assert sizes(base, DeltaConfig(ia3=Ia3Config())).trainable == 12 * (768 + 768 + 3072)


def test_uneven_ranks_count_without_padding():
    config = LoraConfig(targets=("mlp",), rank=4, ranks=("layers[0].mlp.up=1", "layers[1].mlp.down=0"))
    family = FAMILIES["gpt2"]
    d, f = family.model_dim, family.hidden_dim or 4 * family.model_dim
    assert sizes(family, DeltaConfig(config)).trainable == (1 + 4 + 4 + 0) * (d + f)


def test_layers_and_scales_reach_their_layers_only():
    """Layer by layer the padded stack is what each layer's own LoRA is."""
    params = delta_cells.plain("gpt2")
    config = LoraConfig(
        rank=3, alpha=6.0, targets=("mlp.up",), ranks=("layers[1].mlp.up=2",), alphas=("layers[0].mlp.up=12",)
    )
    w = lora.attach(params, config, jax.random.key(0))["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(w, Lora) and w.ranks == (3, 2)
    np.testing.assert_allclose(w.scales, [12 / 3, 6 / 2])
    w = w.replace(b=jnp.where(np.arange(3)[:, None] < np.array(w.ranks)[:, None, None], 1.0, 0.0) * jnp.ones_like(w.b))
    dense = np.asarray(w.dense())
    for layer, (rank, scale) in enumerate([(3, 4.0), (2, 3.0)]):
        alone = w.base[layer] + scale * w.a[layer, :, :rank] @ w.b[layer, :rank]
        np.testing.assert_allclose(dense[layer], alone, rtol=1e-6, atol=1e-6)


def test_trained_where_no_bias_is_stays_beside_the_merge():
    params = methods.attach(delta_cells.plain("llama"), DeltaConfig(bitfit=BitFitConfig()), jax.random.key(0))
    with pytest.raises(ValueError, match="a bias cannot be merged into a module that has none"):
        node.merge(params)


def test_unmerging_gives_the_base_back():
    params = delta_cells.trained("lora, ia3, norms, rows", "gpt2", "float")
    table = params["embed"]["embedding"]
    linear = {**params, "embed": {"embedding": table.base}}
    with pytest.raises(ValueError, match="trained token rows cannot be taken out"):
        node.unmerge(node.merge(params), params)
    back = node.unmerge(node.merge(linear), linear)
    assert jax.tree.structure(back) == jax.tree.structure(linear)
    for (path, a), b in zip(paths.flatten(back), jax.tree.leaves(linear), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)


def test_description_names_what_was_added():
    params = delta_cells.attached("lora, ia3, norms, rows", "gpt2", "float")
    text = describe.describe(params, methods.trainable(params, METHODS["lora, ia3, norms, rows"].config))
    assert "decoder/layers/attention/key/kernel  float32[2x12x12]  IA3, 24 numbers; LoRA of rank 3, 144 numbers" in text
    assert (
        "trained token rows, 24 numbers" in text.splitlines()[-2] + text and "numbers train (" in text.splitlines()[-1]
    )


ERRORS = [
    (
        DeltaConfig(LoraConfig(rank=13)),
        "decoder/layers/attention/key/kernel is 12 x 12: rank=13 exceeds its smaller side",
    ),
    (DeltaConfig(LoraConfig(targets=("layers[0:3]",))), "there are layers 0 to 1, not '0:3'"),
    (DeltaConfig(LoraConfig(targets=("mlp.op",))), "target 'mlp.op' matches no parameter"),
    (DeltaConfig(LoraConfig(ranks=("mlp",))), "'mlp' is not of the form target=number"),
    (
        DeltaConfig(LoraConfig(targets=("mlp",), ranks=("attention.key=2",))),
        "attention/key/kernel, which is not a target",
    ),
    (DeltaConfig(ia3=Ia3Config(outputs=("layers[0].mlp.up",))), "IA3 takes all layers of"),
    (DeltaConfig(bitfit=BitFitConfig(targets=("layers[0].mlp",))), "BitFit takes all layers of"),
    (DeltaConfig(token_rows=(3, 31)), "different numbers from 0 to 30"),
]


@pytest.mark.parametrize("config, message", ERRORS)
def test_errors(config, message):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda p: methods.attach(p, config, jax.random.key(0)), abstract(FAMILIES["gpt2"]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_of_a_kind_are_refused():
    for config, message in (
        (DeltaConfig(LoraConfig()), "carries LoRA already"),
        (DeltaConfig(ia3=Ia3Config()), "IA3 already"),
    ):
        once = methods.attach(delta_cells.plain("gpt2"), config, jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            methods.attach(once, config, jax.random.key(0))
