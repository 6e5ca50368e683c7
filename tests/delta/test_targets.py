"""Targets: names that mean the same in every family, ranges of layers, and patterns that must match."""

import jax
import pytest
from delta_cells import FAMILIES, plain

from llm_jax.delta import targets
from llm_jax.models import parameters
from llm_jax.nn import paths
from llm_jax.nn.stack import unstack


def shapes(family):
    return parameters.declared(FAMILIES[family])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_mean_the_same_in_every_family(family):
    tree = shapes(family)
    kernels = [p for p, _ in paths.flatten(tree) if p.endswith("kernel")]
    found = lambda *names: set(targets.resolve(tree, names))
    sublayers = {p for p in kernels if {"attention", "cross_attention", "mlp"} & set(p.split("/"))}
    assert found("all-linear") == found("layers[0:]") == sublayers
    assert found("mlp") == {p for p in kernels if "/mlp/" in p}
    assert found("mlp.up") == {p for p in kernels if p.endswith("mlp/up/kernel")}
    assert found("attention") == {p for p in kernels if "/attention/" in p}
    assert found("attention.query", "attention.value") == {
        p for p in kernels if p.endswith(("/attention/query/kernel", "/attention/value/kernel"))
    }


def test_stacks_of_encoder_decoders():
    tree = shapes("t5")
    both = set(targets.resolve(tree, "attention.query"))
    assert both == {f"{s}/layers/attention/query/kernel" for s in ("encoder", "decoder")}
    assert set(targets.resolve(tree, "decoder.attention.query")) == {"decoder/layers/attention/query/kernel"}
    assert all(p.startswith("decoder/layers/cross_attention/") for p in targets.resolve(tree, "cross_attention"))
    assert targets.layer_counts(tree) == {"encoder": 2, "decoder": 3}
    assert set(targets.resolve(tree, "encoder.layers[1].mlp").values()) == {(1,)}


@pytest.mark.parametrize("text, layers", [
    ("layers[0]", (0,)), ("layers[1:3]", (1, 2)), ("layers[:2]", (0, 1)), ("layers[0,2]", (0, 2)),
    ("layers[0:3]", None),
])  # fmt: skip
def test_layers(text, layers):
    tree = shapes("bert")
    assert set(targets.resolve(tree, f"{text}.mlp.up").values()) == {layers}
    one_each = jax.eval_shape(unstack, tree)
    numbers = range(3) if layers is None else layers
    wanted = {f"encoder/layers/{i}/mlp/up/kernel" for i in numbers}
    assert set(targets.resolve(one_each, f"{text}.mlp.up")) == wanted


def test_later_targets_add_layers():
    tree = shapes("bert")
    assert targets.resolve(tree, ["layers[0].mlp.up", "layers[2].mlp.up"]) == {"encoder/layers/mlp/up/kernel": (0, 2)}
    assert targets.resolve(tree, ["layers[0].mlp.up", "mlp.up"]) == {"encoder/layers/mlp/up/kernel": None}


def test_numbers_by_target():
    found = targets.numbers_of(plain("gpt2"), ["mlp=4", "layers[1].mlp.up=2", "embed/embedding=3"])
    assert found["decoder/layers/mlp/up/kernel"] == {0: 4, 1: 2}
    assert found["decoder/layers/mlp/down/kernel"] == {0: 4, 1: 4}
    assert found["embed/embedding"] == {None: 3}


@pytest.mark.parametrize("target, message", [
    ("attention.kweery", "target 'attention.kweery' matches no parameter; modules are called"),
    ("attention/*/kernal", "'attention/*/kernal' matches no parameter"),
    ("layers[0:4]", "there are layers 0 to 2, not '0:4'"), ("layers[3].mlp", "there are layers 0 to 2, not '3'"),
    ("layers[2:1]", "there are layers 0 to 2, not '2:1'"), ("layers[].mlp", "there are layers 0 to 2, not 'nothing'"),
    ("decoder.mlp", "target 'decoder.mlp' matches no parameter"),
])  # fmt: skip
def test_errors(target, message):
    with pytest.raises(ValueError) as error:
        targets.resolve(shapes("bert"), target)
    assert message in str(error.value)
