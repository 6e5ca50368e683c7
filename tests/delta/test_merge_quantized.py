"""Merging into int8: within half a step, refused where the update vanishes; and merging what lies on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import model_params

from llm_jax.compress.quantize import Quantized, dequantize, quantize
from llm_jax.delta import merge_quantized, methods, node
from llm_jax.delta.lora import LoraConfig
from llm_jax.delta.methods import DeltaConfig, Ia3Config
from llm_jax.models import parameters
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import unstack
from llm_jax.parallel.plan import Plan, PlanConfig

LLAMA = LlamaConfig(vocab_size=32, context_length=16, model_dim=16, num_layers=2, num_heads=4, num_kv_heads=4,
                    hidden_dim=24)  # fmt: skip
METHODS = {
    "LoRA": DeltaConfig(lora=LoraConfig(rank=3)),
    "layers": DeltaConfig(lora=LoraConfig(rank=3, targets=("layers[1].mlp", "attention"))),
    "DoRA": DeltaConfig(lora=LoraConfig(rank=3, dora=True)),
    "IA3": DeltaConfig(ia3=Ia3Config()),
    "IA3 and LoRA": DeltaConfig(lora=LoraConfig(rank=3), ia3=Ia3Config()),
}


@functools.cache
def tuned(name, quantized=True, size=0.1, dtype="float32"):
    """A tree with a method on it, whose update is as large as asked for."""
    params = weights.cast(jax.tree.map(jnp.asarray, model_params(LLAMA, std=0.1)), dtype)
    params = methods.attach(quantize(params) if quantized else params, METHODS[name], jax.random.key(0))
    rng = np.random.default_rng(1)
    draw = lambda p, x: x + rng.normal(size=x.shape).astype(x.dtype) * size if p.endswith(("/b", "/factor")) else x
    params = paths.map_with_path(draw, params)
    if name != "layers":
        return params
    real = lambda p, x: x * np.array([[[0.0]], [[1.0]]], np.float32) if "/mlp/" in p and p.endswith("/b") else x
    return paths.map_with_path(real, params)


@pytest.mark.parametrize("change", [lambda t: t, unstack], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("name", METHODS)
def test_a_merged_int8_matrix_is_within_half_a_step(name, change):
    params = change(tuned(name))
    exact = dict(paths.flatten(node.merge(params)))
    merged = merge_quantized.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(node.detach(params))
    carried = node.of(params)
    for path, w in paths.flatten(merged, weights.is_node):
        if path not in carried:
            continue
        want = np.asarray(exact[path])
        if not isinstance(w, Quantized):
            np.testing.assert_array_equal(w, want)
            continue
        step = np.broadcast_to(w.scale, want.shape)
        assert (np.abs(np.asarray(w.dense()) - want) <= 0.5 * step * (1 + 1e-5)).all(), path
        np.testing.assert_allclose(w.scale, np.abs(want).max(axis=-2, keepdims=True) / 127, rtol=1e-6)


def test_an_update_that_vanishes_is_refused_with_its_path():
    small = tuned("LoRA", size=1e-5)
    merged = jax.tree.map(weights.dense, node.detach(small), is_leaf=weights.is_node)
    again = quantize(node.merge(small))
    key = "decoder/layers/attention/key/kernel"
    values = lambda tree: np.asarray(dict(paths.flatten(tree, weights.is_node))[key].values)
    np.testing.assert_array_equal(values(again), values(node.detach(small)))  # merging in silence drops it all
    assert np.abs(np.asarray(dict(paths.flatten(node.merge(small)))[key] - dict(paths.flatten(merged))[key])).max() > 0
    with pytest.raises(ValueError, match=f"merging into int8 keeps .*% of the update of {key}, layer .*50% are asked"):
        merge_quantized.merge(small)
    merge_quantized.merge(tuned("LoRA", size=0.0))  # an update of zero loses nothing
    half = tuned("LoRA", quantized=False, size=1e-5, dtype="bfloat16")  # the same of other coarse numbers
    with pytest.raises(ValueError, match="merging into bfloat16 keeps"):
        merge_quantized.merge(half, 0.99)


def test_the_share_that_must_survive_is_a_choice():
    some = tuned("LoRA", size=3e-4)
    with pytest.raises(ValueError, match="50% are asked for"):
        merge_quantized.merge(some)
    merge_quantized.merge(some, 0.0)
    with pytest.raises(ValueError, match="least=1.5 must lie in"):
        merge_quantized.merge(some, 1.5)
    with pytest.raises(ValueError, match="there is no LoRA or other delta"):
        merge_quantized.merge(node.detach(some))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3 and LoRA"])
def test_what_lies_on_eight_devices_merges_as_on_one(name, quantized):
    params = tuned(name, quantized)
    plan = Plan(PlanConfig(data=4, model=2, zero=3), LLAMA)
    shardings = plan.param_shardings(params, parameters.declared(LLAMA)[1])
    spread = jax.device_put(params, shardings)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread))
    for merge in (node.merge, merge_quantized.merge):
        got, want = merge(spread), merge(params)
        for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(want), strict=True):
            off = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
            assert off <= (1 if a.dtype == jnp.int8 else 1e-6), (path, off)  # a sum of another order may round a half
            assert len(a.sharding.device_set) == 8, path
        up = dict(paths.flatten(dequantize(got)))["decoder/layers/mlp/up/kernel"]
        assert not up.sharding.is_fully_replicated  # nothing was gathered
    if not quantized and name == "LoRA":
        back = node.detach(node.unmerge(node.merge(spread), spread))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(node.detach(params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
