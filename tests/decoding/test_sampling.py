"""Sampling against numpy brute force: kept sets, penalties, blocked n-grams, and the drawn distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.decoding import sampling
from llm_jax.decoding.sampling import SamplingConfig

V = 7


@functools.partial(jax.jit, static_argnums=1)
def truncated(logits, config):
    return sampling.truncate(logits, config)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kept(logits, top_k, top_p, min_p):
    """The tokens that stay, one rule after the other, in float64."""
    left = set(range(V))
    if top_k:
        left = set(sorted(left, key=lambda i: -logits[i])[:top_k])
    if top_p < 1:
        p = softmax(np.where([i in left for i in range(V)], logits, -np.inf))
        mass, nucleus = 0.0, set()
        for i in sorted(left, key=lambda i: -logits[i]):
            nucleus.add(i)
            mass += p[i]
            if mass >= top_p:
                break
        left = nucleus
    if min_p:
        p = softmax(logits)
        left = {i for i in left if p[i] >= min_p * p.max()}
    return left


RULES = [(0, 1.0, 0.0), (1, 1.0, 0.0), (3, 1.0, 0.0), (99, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0),
         (0, 1.0, 0.3), (0, 1.0, 1.0), (4, 0.7, 0.0), (5, 0.95, 0.1)]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_kept_tokens_are_those_of_brute_force(rule):
    logits = np.random.default_rng(0).normal(size=(64, V)).astype(np.float32) * 2
    out = np.asarray(truncated(jnp.asarray(logits), SamplingConfig(1.0, *rule)))
    for row, found in zip(logits, out, strict=True):
        want = kept(row.astype(np.float64), *rule)
        assert {i for i in range(V) if found[i] > -np.inf} == want
        np.testing.assert_array_equal(found[list(want)], row[list(want)])  # what stays is not changed


def test_penalties_by_their_formulas():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, V)).astype(np.float32)
    prompt, output = rng.integers(0, 3, (2, 5, V)).astype(np.int32)
    for r, presence, frequency in [
        (1.0, 0.0, 0.0),
        (1.3, 0.0, 0.0),
        (0.8, 0.0, 0.0),
        (1.0, 0.5, 0.25),
        (1.5, 1.0, -0.5),
    ]:
        config = SamplingConfig(
            repetition_penalty=r, presence_penalty=presence, frequency_penalty=frequency, temperature=1.0
        )
        want = logits.astype(np.float64)
        for b in range(5):
            for v in range(V):
                if prompt[b, v] or output[b, v]:
                    want[b, v] = want[b, v] / r if want[b, v] > 0 else want[b, v] * r
                want[b, v] -= presence * (output[b, v] > 0) + frequency * output[b, v]
        found = jax.jit(sampling.penalize, static_argnums=3)(logits, prompt, output, config)
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
        assert config.counts_tokens == ((r, presence, frequency) != (1.0, 0.0, 0.0))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_blocked_tokens_are_those_of_brute_force(n):
    rng = np.random.default_rng(n)
    history = rng.integers(0, 3, (40, 12)).astype(np.int32)
    length = rng.integers(0, 13, 40).astype(np.int32)
    logits = rng.normal(size=(40, 4)).astype(np.float32)
    block = jax.jit(sampling.block_ngrams, static_argnums=3)
    found = np.asarray(block(logits, history, length, n))
    blocked = 0
    for row in range(40):
        seen = history[row, : length[row]].tolist()
        grams = {tuple(seen[i : i + n]) for i in range(len(seen) - n + 1)}
        banned = {v for v in range(4) if len(seen) >= n - 1 and (*seen[len(seen) - n + 1 :], v) in grams}
        assert {v for v in range(4) if found[row, v] == -np.inf} == banned, (seen, n)
        blocked += len(banned)
    assert blocked > 0
    ones, short = np.ones((1, 4), np.float32), np.zeros((1, n - 1), np.int32)
    assert np.asarray(block(ones, short, np.array([n - 1]), n)).min() == 1


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(logits, config, count):
    keys = jax.random.split(jax.random.key(0), count)
    return sampling.choose(jnp.broadcast_to(logits, (count, V)), keys, config)


@pytest.mark.parametrize(
    "config", [SamplingConfig(1.0), SamplingConfig(0.6), SamplingConfig(1.7, 4, 0.9, 0.05)], ids=str
)
def test_draws_follow_the_distribution(config):
    logits = np.random.default_rng(3).normal(size=V).astype(np.float32)
    scaled = logits.astype(np.float64) / config.temperature
    stay = kept(scaled, config.top_k, config.top_p, config.min_p)
    p = softmax(np.where([i in stay for i in range(V)], scaled, -np.inf))
    count = 20000
    seen = np.bincount(draw(jnp.asarray(logits)[None], config, count), minlength=V)
    assert not seen[p == 0].any()
    chi_square = ((seen - count * p)[p > 0] ** 2 / (count * p)[p > 0]).sum()
    assert chi_square < 22.5, (seen, p)  # 1 in 1000 for 6 degrees of freedom


def test_greedy_and_keys():
    logits = np.random.default_rng(4).normal(size=(6, V)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    choose = jax.jit(sampling.choose, static_argnums=2)
    np.testing.assert_array_equal(choose(logits, keys, SamplingConfig()), np.argmax(logits, -1))
    config = SamplingConfig(1.0)
    first = np.asarray(choose(logits, keys, config))
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, choose(logits, keys, config))
    np.testing.assert_array_equal(first[::-1], choose(logits[::-1], keys[::-1], config))  # rows are on their own
    cold = choose(logits, keys, SamplingConfig(1e-4))
    np.testing.assert_array_equal(cold, np.argmax(logits, -1))


WRONG = [{"temperature": -1.0}, {"top_k": -1}, {"no_repeat_ngram": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1},
         {"min_p": 1.1}, {"repetition_penalty": 0.0}]  # fmt: skip


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_values_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingConfig(**values)
