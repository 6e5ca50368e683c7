"""LoRA: nothing changes when it is attached, merged equals unmerged, and the base costs no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import noise

from llm_jax.compress.quantize import KERNELS, Quantized, dequantize, quantize
from llm_jax.delta import lora
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.models import parameters
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import stack, unstack
from llm_jax.nn.weights import Axes
from llm_jax.training.trainable import combine, partition

LLAMA = LlamaConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40)  # fmt: skip
GPT = GPTConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4)
IDS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
TABLE = ("embed/embedding", "attention/*/kernel", "mlp/*/kernel")  # a tied table too: take and matmul_t


@functools.cache
def base(config):
    return noise(config.make(), 0.3)


def logits(config, params):
    return tiny_models.logits(config, params, IDS)


def filled(params, dtype=jnp.float32):
    """Random B, so that the update counts."""
    rng = np.random.default_rng(1)
    draw = lambda shape: jax.device_put((rng.normal(size=shape) * 0.1).astype(dtype))
    fill = lambda w: w.replace(b=draw(w.b.shape)) if isinstance(w, Lora) else w
    return jax.tree.map(fill, cast(params, dtype), is_leaf=lambda x: isinstance(x, Lora))


attach = jax.jit(lora.attach, static_argnums=1)
cast = jax.jit(weights.cast, static_argnums=1)


def attached(config, **changes):
    return attach(base(config), LoraConfig(**{"rank": 3, "alpha": 6.0, **changes}), jax.random.key(1))


@pytest.mark.parametrize("config, targets", [(LLAMA, TABLE), (GPT, LoraConfig().targets)], ids=["llama", "gpt"])
def test_attaching_changes_nothing_and_merging_folds_it_in(config, targets):
    params = attached(config, targets=targets)
    plain = logits(config, base(config))
    np.testing.assert_allclose(logits(config, params), plain, rtol=0, atol=1e-6)
    trained = filled(params)
    moved = logits(config, trained)
    assert np.abs(moved - plain).max() > 1e-2
    merged = lora.merge(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(base(config))
    np.testing.assert_allclose(logits(config, merged), moved, rtol=1e-6, atol=1e-6)
    back = lora.unmerge(merged, trained)
    for (path, a), (_, b) in zip(paths.flatten(lora.detach(back)), paths.flatten(base(config)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-22, atol=1e-7, err_msg=path)  # rounded once on each way
    assert jax.tree.structure(back) == jax.tree.structure(trained)


def test_merged_equals_unmerged_in_float64_stacked_and_unrolled():
    with jax.enable_x64(True):
        trained = filled(attached(LLAMA, targets=TABLE), jnp.float64)
        want = np.asarray(logits(LLAMA, lora.merge(trained)).astype(jnp.float64))
        for tree in (trained, unstack(trained)):
            np.testing.assert_allclose(logits(LLAMA, tree), want, rtol=1e-12, atol=1e-12)
        back = lora.detach(lora.unmerge(lora.merge(trained), trained))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(cast(base(LLAMA), jnp.float64)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-15)


def test_count_and_start():
    params = attached(LLAMA, targets=TABLE)
    assert all(lora.detach({"k": Lora(a, a, a, 1.0)})["k"] is a for a in jax.tree.leaves(base(LLAMA)))  # no copies
    flat = dict(paths.flatten(params, weights.is_node))
    count = 0
    for path, w in flat.items():
        if not isinstance(w, Lora):
            assert path.endswith(("norm/scale", "scale"))
            continue
        *lead, i, o = w.shape
        assert w.a.shape == (*lead, i, 3) and w.b.shape == (*lead, 3, o) and w.scale == 2.0
        assert not w.b.any() and 0.5 / i**0.5 < np.abs(w.a).max() <= 1 / i**0.5
        assert abs(w.a.std() * (3 * i) ** 0.5 - 1) < 0.2  # uniform on (-1/sqrt(i), 1/sqrt(i))
        count += int(np.prod(lead, dtype=int)) * 3 * (i + o)
    trainable, frozen = partition(params, lora.TRAINABLE)
    assert weights.count(trainable) == count
    assert weights.count(frozen) == weights.count(base(LLAMA))
    draws = [w.a for w in flat.values() if isinstance(w, Lora)]
    assert all(not np.array_equal(x[..., :2, :], y[..., :2, :]) for x in draws for y in draws if x is not y)


def test_trees_of_one_layer_each_match_the_stacked_tree():
    config = LoraConfig(rank=2)
    shapes = lambda make: jax.tree.map(jnp.shape, jax.eval_shape(make, base(LLAMA)))
    one_each = shapes(lambda params: stack(lora.attach(unstack(params), config, jax.random.key(0))))
    assert one_each == shapes(lambda params: lora.attach(params, config, jax.random.key(0)))
    layer = LoraConfig(rank=2, targets=("re:.*layers/1/mlp/.*/kernel",))
    some = attach(unstack(base(LLAMA)), layer, jax.random.key(0))
    assert weights.count(partition(some, lora.TRAINABLE)[0]) == 2 * 3 * (24 + 40)
    np.testing.assert_allclose(logits(LLAMA, some), logits(LLAMA, base(LLAMA)), rtol=0, atol=1e-6)


def test_scale_of_rank_stabilised_lora():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rs=True).scale == 2.0
    w = Lora(jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2), LoraConfig(rank=4, alpha=3.0, rs=True).scale)
    np.testing.assert_array_equal(w.dense(), 1.5 * np.eye(2))


def products(jaxpr):
    """Shapes of every dot_general's result, through scans and calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_costs_no_gradient(quantized):
    params = jax.eval_shape(quantize, base(LLAMA)) if quantized else base(LLAMA)
    params = jax.eval_shape(lambda p: lora.attach(p, LoraConfig(rank=6), jax.random.key(0)), params)
    trainable, frozen = partition(params, lora.TRAINABLE)

    def loss(trainable, frozen):
        return LLAMA.make().apply({"params": combine(trainable, frozen)}, IDS).logits.sum()

    shapes = set(products(jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr))
    kernels = {(24, 24), (24, 12), (24, 40), (40, 24)}
    assert not shapes & kernels
    # those of A and B are there; at a smaller rank that of A would be computed as its transpose
    assert {(24, 6), (6, 24), (6, 12), (40, 6), (6, 40)} <= shapes
    if not quantized:  # the detector sees the base's gradient where it trains
        assert kernels <= set(
            products(jax.make_jaxpr(jax.grad(loss))(params, jax.tree.map(lambda x: None, params)).jaxpr)
        )


@jax.jit
def every_product(w, x, y, ids):
    return weights.dense(w), weights.matmul(x, w), weights.matmul_t(y, w), weights.take(w, ids)


@pytest.mark.parametrize("seed", range(3))
def test_every_product_of_the_node_is_that_of_its_matrix(seed):
    rng = np.random.default_rng(seed)
    w, a, b, x = (rng.normal(size=s) for s in ((6, 5), (6, 2), (2, 5), (3, 4, 6)))
    ids = np.array([[0, 3], [5, 5]])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
    with jax.enable_x64(True):
        for inner, matrix in ((w, w), (Lora(w, a, b, -0.7), w - 0.7 * a @ b)):  # nodes nest
            node, want = Lora(inner, a[::-1], b, 0.3), matrix + 0.3 * a[::-1] @ b
            dense, product, product_t, rows = every_product(node, x, x[..., :5], ids)
            close(dense, want)
            close(product, x @ want)
            close(product_t, x[..., :5] @ want.T)
            close(rows, want[ids])
            assert weights.shape_of(node) == (6, 5)


def test_dropout_is_active_only_with_a_key():
    node = Lora(jnp.zeros((50, 40)), jnp.ones((50, 1)) / 50, jnp.ones((1, 40)), 1.0, dropout=0.25)
    x = jnp.ones((2000, 50))
    np.testing.assert_allclose(weights.matmul(x, node), np.ones((2000, 40)), rtol=1e-6)
    dropped = np.asarray(weights.matmul(x, node, jax.random.key(0)))
    share = dropped[:, 0] * 50 * 0.75  # how many of 50 inputs survive, one number a row
    np.testing.assert_allclose(share, np.round(share), atol=1e-4)
    assert abs(share.mean() - 37.5) < 4 * (50 * 0.25 * 0.75 / 2000) ** 0.5
    assert abs(share.var() - 50 * 0.25 * 0.75) < 1.2
    np.testing.assert_array_equal(dropped, weights.matmul(x, node, jax.random.key(0)))
    frozen = node.replace(dropout=0.0)
    np.testing.assert_array_equal(weights.matmul(x, frozen, jax.random.key(0)), weights.matmul(x, frozen))


def test_dropout_inside_a_model_needs_training():
    params = filled(attached(LLAMA, dropout=0.5))
    without = filled(attached(LLAMA))
    np.testing.assert_array_equal(logits(LLAMA, params), logits(LLAMA, without))
    run = jax.jit(lambda p, key: LLAMA.make().apply({"params": p}, IDS, train=True, rngs={"dropout": key}).logits)
    first = run(params, jax.random.key(0))
    assert np.abs(first - logits(LLAMA, without)).max() > 1e-3
    np.testing.assert_array_equal(first, run(params, jax.random.key(0)))
    assert np.abs(first - run(params, jax.random.key(1))).max() > 1e-3


def test_over_an_int8_base():
    eight = jax.jit(quantize)(base(LLAMA))
    trained = filled(attach(eight, LoraConfig(rank=3), jax.random.key(0)))
    same = lambda a, b: np.testing.assert_allclose(logits(LLAMA, a), logits(LLAMA, b), rtol=1e-5, atol=1e-5)
    same(trained, lora.merge(trained))  # merging dequantizes
    assert not any(map(weights.is_node, jax.tree.leaves(lora.merge(trained), is_leaf=weights.is_node)))
    assert jax.tree.structure(lora.detach(trained)) == jax.tree.structure(eight)
    same(lora.detach(trained), dequantize(eight))


def test_axes_follow_the_kernel():
    plain = Lora(jnp.zeros((2, 6, 4)), jnp.zeros((2, 6, 3)), jnp.zeros((2, 3, 4)), 0.5, 0.1)
    axes = weights.axes_of(plain, Axes("layers", "embed", "mlp"))
    assert (axes.base, axes.a, axes.b) == (
        Axes("layers", "embed", "mlp"), Axes("layers", "embed", None), Axes("layers", None, "mlp"),
    )  # fmt: skip
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, Axes)) == jax.tree.structure(plain)
    over = plain.replace(base=Quantized(jnp.zeros((2, 6, 4), jnp.int8), jnp.zeros((2, 1, 4))))
    inner = weights.axes_of(over, Axes("layers", "embed", "mlp")).base
    assert (inner.values, inner.scale) == (Axes("layers", "embed", "mlp"), Axes("layers", None, "mlp"))


def test_cast_reaches_the_base():
    node = Lora(Quantized(jnp.zeros((4, 4), jnp.int8), jnp.ones((1, 4))), jnp.ones((4, 2)), jnp.ones((2, 4)), 1.0)
    cast = weights.cast(node, jnp.bfloat16)
    assert cast.a.dtype == cast.b.dtype == jnp.bfloat16
    assert cast.base.values.dtype == jnp.int8 and cast.base.scale.dtype == jnp.float32
    assert weights.cast(node.replace(base=jnp.ones((4, 4))), jnp.bfloat16).base.dtype == jnp.bfloat16


ERRORS = [
    (lambda: attached(LLAMA, targets=("attention/*/kernal",)), "'attention/*/kernal' matches no parameter"),
    (lambda: attached(LLAMA, targets=("final_norm/scale",)), "final_norm/scale has shape (24,) and is not a matrix"),
    (lambda: attached(LLAMA, targets=("attention_norm/scale",)), "is not a matrix"),
    (lambda: attached(GPT, targets=("query/bias",)), "is not a matrix"),
    (lambda: lora.attach(attached(LLAMA), LoraConfig(), jax.random.key(0)), "carries LoRA already"),
    (lambda: lora.merge(base(LLAMA)), "there is no LoRA"),
    (lambda: lora.detach(base(LLAMA)), "there is no LoRA"),
    (lambda: LoraConfig(rank=0), "rank=0 must be at least 1"),
    (lambda: LoraConfig(dropout=1.0), "dropout=1.0 must lie in [0, 1)"),
]


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


FAMILIES = {
    **tiny_models.MODELS, **tiny_models.ENCODERS, **tiny_models.ENCODER_DECODERS,
    "xlnet": XLNetConfig(vocab_size=31, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10),
}  # fmt: skip
SUBLAYERS = {"attention", "cross_attention", "mlp"}
# the matrices that the defaults leave as they are
LEFT = ("embedding", "head/kernel", "head/transform/kernel", "head/output/kernel", "pooler/kernel", "pair/kernel",
        "embed_projection/kernel")  # fmt: skip


@pytest.mark.parametrize("targets", [LoraConfig().targets, KERNELS], ids=["lora", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_take_every_kernel_of_every_sublayer(name, targets):
    declared = dict(paths.flatten(parameters.declared(FAMILIES[name])[0]))
    matrices = [p for p in declared if p.endswith(("kernel", "embedding"))]
    chosen = paths.select(matrices, targets)
    assert chosen == [p for p in matrices if SUBLAYERS & set(p.split("/"))]
    assert all(paths.matcher(LEFT)(p) for p in matrices if p not in chosen)


def test_cross_attention_has_all_four_by_default():
    shapes = parameters.declared(tiny_models.ENCODER_DECODERS["t5"])[0]
    for change in (lambda p: lora.attach(p, LoraConfig(), jax.random.key(0)), quantize):
        cross = jax.eval_shape(change, shapes)["decoder"]["layers"]["cross_attention"]
        assert {k for k, v in cross.items() if weights.is_node(v["kernel"])} == {"query", "key", "value", "out"}
