"""One table of models, many properties; each model compiles once and every property reads the results."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONTEXT, MODELS, V, abstract, count_bert, model_params

from llm_jax.models.shared import frame
from llm_jax.nn import weights
from llm_jax.nn.cache import init_cache
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import unstack

T, PAD = 7, 3
IDS = np.random.default_rng(0).integers(0, V, (2, T))
REAL = np.array([[1] * T, [1] * (T - 2) + [0] * 2], bool)  # the second row is shorter


def test_only_plain_rows_are_ordered():
    def ordered(mask=None, segments=None, cache=None):
        return jax.eval_shape(lambda *a: frame.read_inputs(*a, CONTEXT).mask, IDS, mask, None, segments, cache).ordered

    assert ordered() and not ordered(mask=REAL) and not ordered(segments=IDS)
    assert not ordered(cache=jax.eval_shape(lambda: init_cache(1, 2, T, 1, 4)))


class Probe(weights.Weight):
    """An embedding table with something added to every looked-up row: gradients by position."""

    base: Any
    offset: Any

    @property
    def shape(self):
        return self.base.shape

    def dense(self):
        return self.base

    def take(self, ids):
        return weights.take(self.base, ids) + self.offset


def left(x, fill=0):
    """Every row moved right behind PAD slots, so that its real tokens end the row."""
    out = np.full((2, PAD + T), fill, x.dtype)
    for b in range(2):
        n = REAL[b].sum()
        out[b, PAD + T - n :] = x[b, :n]
    return out


LEFT_IDS, LEFT = left(IDS), left(REAL, False)
RIGHT_IDS, RIGHT = np.pad(np.where(REAL, IDS, 5), ((0, 0), (0, PAD))), np.pad(REAL, ((0, 0), (0, PAD)))
GARBAGE = np.where(LEFT, LEFT_IDS, 9)


def decode(model, params, config):
    """Logits of every real token: a ragged prompt of 3 slots (left padded), then one token a time."""
    prompt = 3
    cache = config.init_cache(2, T + 1)
    out = model.apply(
        {"params": params}, jnp.asarray(LEFT_IDS[:, : PAD + prompt]), LEFT[:, : PAD + prompt], cache=cache
    )

    def one(cache, x):
        ids, real = x
        out = model.apply({"params": params}, ids[:, None], real[:, None], cache=cache)
        return out.cache, out.logits[:, 0]

    rest = (LEFT_IDS[:, PAD + prompt :].T, LEFT[:, PAD + prompt :].T)
    cache, logits = jax.lax.scan(one, out.cache, rest)
    return jnp.concatenate([out.logits, logits.swapaxes(0, 1)], axis=1), cache.length_B


@functools.cache
def results(name):
    config = MODELS[name]
    model, params = config.make(), model_params(config)
    # two documents in one row, the second at another place than alone
    packed = np.concatenate([IDS[0], IDS[1, :5]])[None]
    segments = np.array([[1] * T + [2] * 5])
    draw = np.random.default_rng(1).normal(size=(T, V)).astype(np.float32)

    @jax.jit
    def run(params):
        apply = lambda *a, p=params, **kw: model.apply({"params": p}, *a, **kw)
        out = apply(IDS, output_hidden_states=True, output_attentions=True)

        def at(offset):
            table = Probe(params["embed"]["embedding"], offset)
            logits = apply(IDS, p={**params, "embed": {"embedding": table}}).logits[..., :V]
            return jnp.sum(logits * draw[None], axis=-1)[0]

        influence = jax.jacobian(at)(jnp.zeros((2, T, config.model_dim)))  # [T, B, T, D]
        logits, length = decode(model, params, config)
        return dict(
            out=out,
            influence=jnp.abs(influence).sum(-1),
            padded=apply(np.concatenate([RIGHT_IDS, LEFT_IDS, GARBAGE]), np.concatenate([RIGHT, LEFT, LEFT])).logits,
            packed=apply(packed, segment_ids=segments).logits,
            unstacked=apply(IDS, p=unstack(params)).logits,
            decoded=logits,
            length=length,
        )

    return jax.device_get(run(params))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def real_rows(x, padding=0):
    """The real tokens' entries of left padded rows, per row."""
    return [x[b, x.shape[1] - REAL[b].sum() :] if padding else x[b, : REAL[b].sum()] for b in range(2)]


def count(config):
    """Parameters in closed form."""
    c, rows = config, -(-config.vocab_size // config.vocab_pad_multiple) * config.vocab_pad_multiple
    d, tables = c.model_dim, rows * c.model_dim * (1 if c.tied else 2)
    if hasattr(c, "pooler"):
        return count_bert(c)
    if hasattr(c, "norm"):
        f = c.hidden_dim or 4 * d
        layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
        m, h = c.max_distance, d // c.num_heads
        layer += {"shaw": 2 * (2 * m + 1) * h, "xlnet": d * d + 2 * d, "deberta": 2 * d * d}.get(c.positions, 0)
        once = {"learned": c.context_length * d, "t5": 32 * c.num_heads, "deberta": 2 * m * d}.get(c.positions, 0)
        return tables + once + c.num_layers * layer + (2 * d if c.norm == "pre" else 0)
    h, f = c.head_dim or d // c.num_heads, c.hidden_dim
    q, kv = c.num_heads * h, c.num_kv_heads * h
    layer = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d
    layer += (q + 2 * kv) * c.qkv_bias + d * c.out_bias + (2 * f + d) * c.mlp_bias + 2 * h * c.qk_norm
    return tables + c.num_layers * layer + d


def test_abstract_init_has_the_configs_sizes(name):
    config = MODELS[name]
    params, axes = abstract(config.make(), IDS)
    assert weights.count(params) == count(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    names = jax.tree.map(lambda a: tuple(a), axes, is_leaf=lambda a: isinstance(a, weights.Axes))
    assert names["encoder" if "encoder" in names else "decoder"]["layers"]["attention"]["query"]["kernel"] == (
        "layers",
        "embed",
        "heads",
    )
    assert jax.tree.map(lambda x: x.ndim, params) == jax.tree.map(
        len, axes, is_leaf=lambda a: isinstance(a, weights.Axes)
    )


def test_outputs_have_their_shapes_and_are_finite(name):
    config, out = MODELS[name], results(name)["out"]
    n, d = config.num_heads, config.model_dim
    assert out.logits.shape == (2, T, count_rows(config)) and out.last_hidden_state.shape == (2, T, d)
    assert [h.shape for h in out.hidden_states] == [(2, T, d)] * (config.num_layers + 1)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    assert [a.shape for a in out.attentions] == [(2, n, T, T)] * config.num_layers
    close(np.stack(out.attentions).sum(-1), 1)
    assert np.isfinite(out.logits).all() and out.pooler_output is None and out.cache is None
    p = np.exp(out.logits - out.logits.max(-1, keepdims=True))
    assert (p[..., V:] == 0).all()


def count_rows(config):
    return -(-V // config.vocab_pad_multiple) * config.vocab_pad_multiple


def test_no_token_sees_the_future_nor_another_row(name):
    influence, window = results(name)["influence"], getattr(MODELS[name], "window", None)
    reach = T if window is None else (window - 1) * MODELS[name].num_layers  # a window widens layer by layer
    for t in range(T):
        for s in range(T):
            if s > t or t - s > reach:
                assert influence[t, 0, s] == 0, (t, s)
            else:
                assert influence[t, 0, s] > 1e-6, (t, s)
    assert (influence[:, 1] == 0).all()


def test_padding_changes_no_real_token(name):
    r = results(name)
    right, left_, garbage = np.split(r["padded"], 3)
    rows = real_rows(r["out"].logits), real_rows(right), real_rows(left_, 1), real_rows(garbage, 1)
    for plain, right, left_, garbage in zip(*rows, strict=True):
        close(right, plain)
        close(left_, plain)
        np.testing.assert_array_equal(garbage, left_)  # what stands in a padded slot is never read
    assert np.isfinite(r["padded"]).all()


def test_packed_documents_equal_separate_ones(name):
    r = results(name)
    close(r["packed"][0, :T], r["out"].logits[0])
    close(r["packed"][0, T:], r["out"].logits[1, :5])


def test_decoding_equals_one_pass(name):
    r = results(name)
    for decoded, plain in zip(real_rows(r["decoded"], 1), real_rows(r["out"].logits), strict=True):
        close(decoded, plain)
    assert r["length"].tolist() == REAL.sum(1).tolist()


def test_stacked_equals_unstacked(name):
    r = results(name)
    close(r["unstacked"], r["out"].logits)


def test_jit_equals_no_jit():
    config = MODELS["gpt2"]
    out = config.make().apply({"params": model_params(config)}, IDS)
    close(out.logits, results("gpt2")["out"].logits)


def test_float64_and_attention_implementations():
    """In float64 only rounding is left: scanned in chunks == unrolled reference, and decoding == one pass."""
    config = MODELS["qwen3"]
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, model_params(config))

        @jax.jit
        def run(params):
            chunked, reference = (config.make(Execution(attention=a)) for a in ("chunked", "reference"))
            plain = reference.apply({"params": unstack(params)}, IDS).logits

            def step(cache, ids):
                out = reference.apply({"params": params}, ids[:, None], cache=cache)
                return out.cache, out.logits[:, 0]

            steps = jax.lax.scan(step, config.init_cache(2, T + 2, "float64"), IDS.T)[1].swapaxes(0, 1)
            return plain, chunked.apply({"params": params}, IDS).logits, steps

        plain, chunked, steps = jax.device_get(run(params))
        assert plain.dtype == np.float64
        np.testing.assert_allclose(chunked, plain, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(steps, plain, rtol=1e-10, atol=1e-10)
    close(plain, results("qwen3")["out"].logits)


def test_a_full_cache_goes_on_as_a_sliding_window():
    """As many slots as the window is wide: the ring forgets exactly what the window hides."""
    config = MODELS["mistral"]
    model, params = config.make(), model_params(config)

    @jax.jit
    def run(params):
        def one(cache, ids):
            out = model.apply({"params": params}, ids[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        return jax.lax.scan(one, config.init_cache(2, config.window), IDS.T)[1].swapaxes(0, 1)

    close(run(params), results("mistral")["out"].logits)


@pytest.mark.parametrize("name", ["gpt1", "qwen3"])
def test_compute_dtype(name):
    model = MODELS[name].make(Execution(dtype="bfloat16"))
    params = abstract(model, IDS)[0]
    out = jax.eval_shape(lambda p: model.apply({"params": p}, IDS, output_hidden_states=True), params)
    assert {h.dtype for h in out.hidden_states} == {jnp.dtype("bfloat16")} and out.logits.dtype == "float32"


def test_dropout_on_embeddings_alone():
    config = dataclasses.replace(MODELS["gpt2"], embed_dropout=0.5)
    params = model_params(config)
    run = jax.jit(lambda key: config.make().apply({"params": params}, IDS, train=True, rngs={"dropout": key}))
    a, b, c = (run(jax.random.key(s)).logits for s in (0, 0, 1))
    assert (a == b).all() and not np.allclose(a, c)
    assert not np.allclose(a, results("gpt2")["out"].logits)


MASK = np.arange(T)[None, :] < np.array([T, 5])[:, None]
LONG = np.zeros((1, CONTEXT + 1), np.int32)
KEY = {"dropout": jax.random.key(0)}


@pytest.mark.parametrize(
    "family, size, held, mask",
    [("llama", T + 1, 3, MASK), ("llama", T + 1, 9, np.eye(2, T)), ("mistral", T + 2, 30, None)],
    ids=["padding", "one a row", "a window that fits"],
)
def test_several_tokens_may_go_where_nothing_is_overwritten(family, size, held, mask):
    cache = MODELS[family].init_cache(2, size).replace(length_B=np.array([0, held]))
    args = (IDS, mask, None, None, cache, None, MODELS[family].window)
    assert frame.read_inputs(*args).slots_BT.shape == IDS.shape


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "call, words",
    [
        (dict(train=True), "train=True needs a dropout key"),
        (dict(rngs=KEY), "a dropout key was given but train=False"),
        (dict(token_type_ids=IDS), "has no token types"),
        (dict(input_ids=IDS[0]), r"input_ids must be \[B, T\] integers, got int64\[7\]|int32\[7\]"),
        (dict(input_ids=IDS.astype(np.float32)), r"got float32\[2, 7\]"),
        (dict(input_ids=LONG), "sequence of 17 tokens is longer than the model's context of 16"),
        (dict(segment_ids=IDS, cache=T), "segment_ids and a cache exclude each other"),
        (dict(cache=T - 1), "7 tokens do not fit into a cache of 6"),
        (dict(cache=T + 1, length=2), "7 tokens at once would overwrite .* a cache of 8 that holds 2: pass one"),
        (dict(cache=T + 1, length=4, attention_mask=MASK), "5 tokens at once would .* a cache of 8 that holds 4"),
    ],
)
def test_what_a_decoder_cannot_honour_is_an_error(family, call, words):
    config = MODELS[family]
    call = {"input_ids": IDS, **call}
    if "cache" in call:
        length = jnp.asarray([0, call.pop("length", 0)])
        call["cache"] = config.init_cache(2, call["cache"]).replace(length_B=length)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: config.make().apply({"params": model_params(config)}, **call))
