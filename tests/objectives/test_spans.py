"""Span corruption rebuilds the text, with the shares and sizes of the paper; prefixes are cut evenly."""

import jax
import numpy as np
import pytest

from llm_jax.objectives import spans

V, END = 1000, 1
TEXT = np.random.default_rng(0).integers(2, 800, 100)
KEYS = jax.random.split(jax.random.key(0), 400)


def corrupt(density, mean, end=END, text=TEXT):
    run = jax.jit(jax.vmap(lambda k: spans.corrupt(k, text, density, mean, V, end)))
    return jax.device_get(run(KEYS))


@pytest.mark.parametrize("density, mean, end", [(0.15, 3.0, END), (0.15, 3.0, None), (0.5, 1.0, END), (0.3, 8.0, END)])
def test_restoring_rebuilds_the_text(density, mean, end):
    sources, targets = corrupt(density, mean, end)
    noise, count = spans.sizes(100, density, mean)
    assert spans.lengths(100, density, mean, end is not None) == (sources.shape[1], targets.shape[1])
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        assert spans.restore(source, target, V, count, end) == TEXT.tolist()
        sentinels = [t for t in source if t >= V - count]
        assert sentinels == [V - 1 - i for i in range(count)] == [t for t in target if t >= V - count]
        assert (end is None) or (source[-1] == target[-1] == end)
        assert len(target) == noise + count + (end is not None)


def test_every_token_is_taken_out_as_often():
    """Over many keys; the first never is, since a text begins with what stays."""
    mask = np.asarray(jax.jit(jax.vmap(lambda k: spans.noise_mask(k, 100, 0.15, 3.0)))(KEYS))
    assert (mask.sum(1) == 15).all()
    runs = (mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(1)
    assert (runs == 5).all() and not mask[:, 0].any()
    share = mask[:, 15:90].mean(0)
    chi_square = ((share - share.mean()) ** 2 / (share.mean() * (1 - share.mean()) / len(mask))).sum()
    assert chi_square < 75 + 4 * np.sqrt(2 * 75)


def test_span_sizes_are_a_uniform_partition():
    """15 tokens in 5 spans: the first has k with probability C(14 - k, 3) / C(14, 4)."""
    import math

    mask = np.asarray(jax.jit(jax.vmap(lambda k: spans.noise_mask(k, 100, 0.15, 3.0)))(KEYS))
    first = [next(n for n in range(1, 16) if not row[row.argmax() + n]) for row in mask[:, :]]
    want = np.array([math.comb(14 - k, 3) / math.comb(14, 4) for k in range(1, 6)])
    seen = np.array([first.count(k) for k in range(1, 6)])
    assert ((seen - len(mask) * want) ** 2 / (len(mask) * want)).sum() < 30


def test_the_longest_text_whose_source_fits():
    for length in (16, 64, 512):
        size = spans.fitting(length, 0.15, 3.0, True)
        assert spans.lengths(size, 0.15, 3.0, True)[0] <= length < spans.lengths(size + 1, 0.15, 3.0, True)[0]
    assert spans.fitting(512, 0.15, 3.0, True) == 568  # as T5's own helper finds
    assert spans.lengths(568, 0.15, 3.0, True)[1] == 114


@pytest.mark.parametrize("length, density, mean", [(1, 0.15, 3.0), (4, 0.9, 1.0)])
def test_texts_too_short(length, density, mean):
    with pytest.raises(ValueError, match=f"a text of {length} tokens is too short for span corruption"):
        spans.corrupt(KEYS[0], TEXT[:length], density, mean, V, END)
    with pytest.raises(ValueError, match="a text of 1 tokens cannot be cut"):
        spans.cut(KEYS[0], TEXT[:1])


def test_prefixes_are_cut_evenly_and_lose_nothing():
    source, labels = jax.device_get(jax.jit(jax.vmap(lambda k: spans.cut(k, TEXT[:11])))(KEYS))
    sizes = source["attention_mask"].sum(1)
    assert set(sizes.tolist()) == set(range(1, 11))
    counts = np.bincount(sizes, minlength=11)[1:]
    assert ((counts - 40) ** 2 / 40).sum() < 9 + 4 * np.sqrt(18)
    for ids, n, row in zip(source["input_ids"], sizes, labels, strict=True):
        assert [*ids[:n], *row[row >= 0]] == TEXT[:11].tolist() and (row[11 - n :] == -100).all()
