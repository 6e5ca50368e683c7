"""Scores of content against distance, and what values gain, against the papers' sums written as loops."""

import jax
import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.models.gpt import GPTConfig
from llm_jax.nn.attend import Mask
from llm_jax.nn.attention import Attention, AttentionConfig, View
from llm_jax.nn.relations import Relations, distance_encodings
from llm_jax.nn.relative_scores import (
    Deberta,
    DebertaScores,
    Distances,
    Shaw,
    ShawScores,
    TransformerXL,
    TransformerXLScores,
)
from llm_jax.nn.two_stream import TwoStreamAttention

B, T, N, H, M = 2, 6, 2, 4, 3
RNG = np.random.default_rng(0)
Q, K = (RNG.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(2))
W = RNG.uniform(size=(B, N, T, T)).astype(np.float32)
AT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
MASK = Mask(AT, AT)
TABLE = RNG.normal(size=(2 * M, N * H)).astype(np.float32)


def shaw(p, q, k, d):
    del k
    return np.einsum("bnh,h->bn", q, p["keys"][np.clip(d, -M, M) + M])


def xlnet(p, q, k, d):
    angle = d / 10000 ** (np.arange(0, N * H, 2) / (N * H))
    r = (np.concatenate([np.sin(angle), np.cos(angle)]) @ p["position"]["kernel"]).reshape(N, H)
    return np.einsum("bnh,nh->bn", q + p["position_bias"], r) + np.einsum("bnh,nh->bn", k, p["content_bias"])


def deberta(p, q, k, d):
    """`delta(i, j)` of the paper: 0 for i - j <= -m, 2 m - 1 for i - j >= m, else i - j + m."""
    delta = min(max(d + M, 0), 2 * M - 1)
    keys, queries = ((TABLE[delta] @ p[f"position_{n}"]["kernel"]).reshape(N, H) for n in ("key", "query"))
    return np.einsum("bnh,nh->bn", q, keys) + np.einsum("bnh,nh->bn", k, queries)


SUMS = {"shaw": shaw, "xlnet": xlnet, "deberta": deberta}
LAYERS = {"shaw": ShawScores, "xlnet": TransformerXLScores, "deberta": DebertaScores}


def made(kind):
    module = LAYERS[kind](AttentionConfig(N * H, N, N, H), M)
    return module, random_params(module, Q, K, MASK, False, Distances(TABLE))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", SUMS)
def test_scores(kind, cached):
    module, params = made(kind)
    run = jax.jit(lambda params: module.apply({"params": params}, Q, K, MASK, cached, Distances(TABLE)))
    scores = np.asarray(run(params))
    assert scores.shape == (B, N, T, T)
    for i in range(T):
        for j in range(T if not cached else i + 1):  # a cache holds nothing behind a query
            np.testing.assert_allclose(scores[:, :, i, j], SUMS[kind](params, Q[:, i], K[:, j], i - j), atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_what_values_gain(cached):
    module, params = made("shaw")
    gained = jax.jit(lambda params: module.apply({"params": params}, W, MASK, cached, method="values"))(params)
    vectors = params["values"][np.clip(AT[0][:, None] - AT[0][None, :], -M, M) + M]
    np.testing.assert_allclose(gained, np.einsum("bnts,tsh->btnh", W, vectors), atol=1e-5)


def test_attention_is_xlnets_with_one_stream():
    """The same kernels in the layer that is proved against transformers."""
    d, x = N * H, RNG.normal(size=(B, T, N * H)).astype(np.float32)
    attention = Attention(AttentionConfig(d, N, N, H, positions=TransformerXL()))
    params = random_params(attention, x, View(MASK))
    relations = Relations(np.float32(distance_encodings(T, T, d, None, False)), MASK)
    own = {name: params[name] for name in ("query", "key", "value", "out")}
    rest = {**params["relative"], "segment_bias": np.zeros((N, H)), "segments": np.zeros((2, N, H))}
    two_streams = TwoStreamAttention(attention.config)

    @jax.jit
    def both(params, theirs):
        (content, _), *_ = two_streams.apply({"params": theirs}, (x, None), relations)
        return attention.apply({"params": params}, x, View(MASK))[0], content

    ours, theirs = both(params, own | rest)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_dropout_reaches_what_values_gain():
    config = AttentionConfig(N * H, N, N, H, dropout=0.5, positions=Shaw(M))
    attention, x = Attention(config), RNG.normal(size=(1, T, N * H)).astype(np.float32)
    view = View(Mask(AT[:1], AT[:1]))
    params = random_params(attention, x, view)
    params["value"]["kernel"][:] = 0  # the gain alone is left
    run = jax.jit(lambda key: attention.apply({"params": params}, x, view, train=True, rngs={"dropout": key})[0])
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: GPTConfig(positions="rotation"), "positions='rotation' is not one of .* shaw, xlnet, deberta"),
        (lambda: Shaw(0), "max_distance=0 must be at least 1"),
        (lambda: Deberta(0), "max_distance=0 must be at least 1"),
        (lambda: AttentionConfig(8, 4, 2, 2, positions=Shaw()), "num_kv_heads=2 equal"),
    ],
)  # fmt: skip
def test_bad_configs(make, words):
    with pytest.raises(ValueError, match=words):
        make()
