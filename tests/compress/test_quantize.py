"""int8 weights: the rounding bound elementwise, every product equal to the dense one, models equal to dequantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import noise

from llm_jax.compress.quantize import KERNELS, Quantized, dequantize, quantize, quantize_array
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import unstack
from llm_jax.nn.weights import Axes
from llm_jax.training.trainable import partition

LLAMA = LlamaConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40)  # fmt: skip
GPT = GPTConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, tied=False)
IDS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
WHOLE = (*KERNELS, "embed/embedding")


@functools.cache
def base(config):
    return noise(config.make(), 0.3)


def logits(config, params):
    return tiny_models.logits(config, params, IDS)


def matrix(shape, seed=0):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w[..., 1] = 0  # a channel of zeros
    w[..., 2, :] = 0
    w[..., 0, 0] = 1000  # and one of outliers
    return w


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5), (1, 1 + 3, 9)])
def test_rounds_to_the_nearest_level(axis, shape):
    w = matrix(shape)
    q = quantize_array(jnp.asarray(w), axis)
    top = np.abs(w).max(axis, keepdims=True)
    step = np.where(top == 0, 1, top / np.float32(127))
    assert q.values.dtype == jnp.int8 and q.scale.dtype == jnp.float32 and q.shape == shape
    assert np.abs(np.asarray(q.values, int)).max() == 127
    np.testing.assert_allclose(q.scale, step, rtol=2**-22)  # XLA multiplies by 1/127
    np.testing.assert_array_equal(q.values, np.round(w / q.scale).astype(np.int8))
    assert (np.abs(w - np.asarray(q.dense())) <= step / 2 * (1 + 1e-5)).all()
    assert not np.asarray(q.dense())[np.broadcast_to(top == 0, shape)].any()
    again = quantize_array(q.dense(), axis)
    np.testing.assert_array_equal(again.values, q.values)  # levels are fixed points


def test_half_precision_and_float64_kernels():
    w = matrix((8, 4)) / 1000
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(w, dtype)
        q = quantize_array(half)
        assert q.scale.dtype == jnp.float32
        assert (np.abs(np.asarray(half, np.float32) - q.dense()) <= np.asarray(q.scale) * 0.50001).all()


@pytest.mark.parametrize("axis", [-2, -1])
def test_every_product_is_that_of_the_dense_matrix(axis):
    q = quantize_array(jnp.asarray(matrix((6, 5), 1) / 100), axis)
    dense = np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64)
    x = np.random.default_rng(2).normal(size=(3, 2, 6)).astype(np.float32)
    ids = np.asarray([[0, 5], [2, 2]])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

    @jax.jit
    def products(q, x, y, ids):
        gradient = jax.grad(lambda x: weights.matmul(x, q).sum())(x)
        keyed = weights.matmul(x, q, jax.random.key(0))
        return weights.matmul(x, q), keyed, weights.matmul_t(y, q), weights.take(q, ids), gradient

    product, keyed, product_t, rows, gradient = products(q, x, x[..., :5], ids)
    close(product, x @ dense)
    close(keyed, x @ dense)  # no dropout inside
    close(product_t, x[..., :5] @ dense.T)
    close(rows, dense[ids])
    close(gradient, np.broadcast_to(dense.sum(1), x.shape))
    assert jax.eval_shape(weights.matmul, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), q).dtype == jnp.bfloat16


@pytest.mark.parametrize("config, targets", [(LLAMA, WHOLE), (GPT, KERNELS)], ids=["llama", "gpt"])
def test_a_quantized_model_is_its_dequantized_one(config, targets):
    eight = jax.jit(quantize, static_argnums=1)(base(config), targets)
    nodes = {p: w for p, w in paths.flatten(eight, weights.is_node) if weights.is_node(w)}
    assert len(nodes) == (8 if config is LLAMA else 6)
    if config is LLAMA:
        assert nodes["embed/embedding"].scale.shape == (31, 1)  # tables by row
    assert nodes["decoder/layers/mlp/up/kernel"].scale.shape == (2, 1, 40 if config is LLAMA else 96)
    plain = dequantize(eight)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base(config))
    got, want = logits(config, eight), logits(config, plain)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(want - logits(config, base(config))).max() < 0.1 * np.abs(want).max()  # close, and not the same
    if config is LLAMA:
        np.testing.assert_allclose(logits(config, unstack(eight)), want, rtol=1e-5, atol=1e-5)


def test_bytes_in_closed_form():
    eight = jax.eval_shape(quantize, base(LLAMA))
    kernels = [w for _, w in paths.flatten(eight, weights.is_node) if weights.is_node(w)]
    for w in kernels:
        layers, i, o = w.shape
        assert weights.bytes_of(w) == layers * (i * o + 4 * o)
    plain = sum(4 * np.prod(w.shape) for w in kernels)
    assert 0.25 < weights.bytes_of(kernels) / plain < 0.30
    assert weights.bytes_of(base(LLAMA)) - weights.bytes_of(eight) == plain - weights.bytes_of(kernels)


def test_cast_keeps_the_scales():
    q = quantize_array(jnp.asarray(matrix((4, 4))))
    assert jax.tree.map(lambda x: x.dtype, weights.cast({"k": q}, jnp.bfloat16)) == {
        "k": Quantized(jnp.dtype("int8"), jnp.dtype("float32"))
    }
    assert dequantize({"k": q}, jnp.bfloat16)["k"].dtype == jnp.bfloat16


@pytest.mark.parametrize("axis, scale", [(-2, ("layers", None, "mlp")), (-1, ("layers", "embed", None))])
def test_axes_follow_the_kernel(axis, scale):
    q = quantize_array(jnp.asarray(matrix((2, 4, 4))), axis)
    axes = weights.axes_of(q, Axes("layers", "embed", "mlp"))
    assert (axes.values, axes.scale) == (Axes("layers", "embed", "mlp"), Axes(*scale))


ERRORS = [
    (lambda: quantize(base(LLAMA), "kernal"), ValueError, "pattern 'kernal' matches no parameter"),
    (lambda: quantize(quantize(base(LLAMA), "query/kernel"), "query/kernel"), TypeError, "is Quantized already"),
    (lambda: quantize({"a": jnp.ones(3)}, "a"), TypeError, "a is float32[3], no floating matrix"),
    (lambda: quantize({"a": jnp.ones((3, 3), int)}, "a"), TypeError, "a is int32[3, 3], no floating matrix"),
    (lambda: quantize(base(LLAMA), "attention_norm/scale"), TypeError, "no floating matrix"),
    (lambda: quantize(base(GPT), "query/bias"), TypeError, "no floating matrix"),
    (lambda: partition(jax.eval_shape(quantize, base(LLAMA)), None), TypeError, "holds int8 and cannot train"),
]


@pytest.mark.parametrize("call, kind, message", ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
