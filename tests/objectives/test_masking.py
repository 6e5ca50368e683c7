"""Masking: exact counts, rates by chi-square, whole units, and never a token that may not be masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.objectives import masking

ROWS, T, V, MASK = 400, 40, 50, 49
RNG = np.random.default_rng(0)
MASKABLE = RNG.random((ROWS, T)) < 0.8
WORDS = np.cumsum(RNG.random((ROWS, T)) < 0.6, axis=1).astype(np.int32)
WORDS -= WORDS[:, :1]
TOKENS = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))
IDS = RNG.integers(0, V - 1, (ROWS, T)).astype(np.int32)
KEYS = jax.random.split(jax.random.key(1), ROWS)


@jax.jit
def run(units):
    chosen = jax.vmap(lambda k, u, m: masking.choose(k, u, m, 0.15))(KEYS, units, MASKABLE)
    new = jax.vmap(lambda k, i, c: masking.corrupt(k, i, c, MASK, V, 0.8, 0.1))(KEYS, IDS, chosen)
    spans = jax.vmap(lambda k, w: masking.join(k, w, 3))(KEYS, units)
    return chosen, new, spans


def chi_square(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return float(((counts - expected) ** 2 / expected).sum())


def test_single_tokens_are_chosen_exactly_and_evenly():
    chosen = np.asarray(run(TOKENS)[0])
    want = np.maximum(1, np.floor(MASKABLE.sum(1) * 0.15 + 0.5))
    np.testing.assert_array_equal(chosen.sum(1), want)
    assert not (chosen & ~MASKABLE).any()
    share = want / MASKABLE.sum(1)
    expected = (MASKABLE * share[:, None]).sum(0)  # every maskable token of a row is as likely as another
    assert chi_square(chosen.sum(0), expected) < 73.4  # 40 places: 0.999 of chi-square with 40 degrees lies below


def test_of_the_chosen_80_are_masked_10_random_10_kept():
    chosen, new, _ = map(np.asarray, run(TOKENS))
    np.testing.assert_array_equal(new[~chosen], IDS[~chosen])
    n = chosen.sum()
    masked = (new == MASK)[chosen].sum()
    kept = (new == IDS)[chosen].sum()
    other = n - masked - kept
    # a random entry is the mask with probability 1/V and the token itself with 1/V
    expected = n * np.array([0.8 + 0.1 / V, 0.1 + 0.1 / V, 0.1 * (1 - 2 / V)])
    assert chi_square([masked, kept, other], expected) < 13.8  # 0.999 with 2 degrees


def test_whole_words_are_chosen_as_a_whole_at_about_the_rate():
    chosen = np.asarray(run(WORDS)[0])
    assert not (chosen & ~MASKABLE).any()
    for row in range(ROWS):
        for word in np.unique(WORDS[row]):
            here = chosen[row][(WORDS[row] == word) & MASKABLE[row]]
            assert here.all() or not here.any(), (row, word)
    assert chosen.sum() / MASKABLE.sum() == pytest.approx(0.15, abs=0.01)
    most = np.maximum(1, np.floor(MASKABLE.sum(1) * 0.15 + 0.5)) + masking.WORD_SLACK
    assert (chosen.sum(1) <= most).all()


def test_spans_join_words_with_probability_of_one_over_their_length():
    spans = np.asarray(run(TOKENS)[2])
    assert (np.diff(spans, axis=1) >= 0).all() and (np.diff(spans, axis=1) <= 1).all()
    lengths = np.concatenate([np.bincount(s)[:-1] for s in spans])  # the last one is cut by the row's end
    counts = np.array([(lengths == n).sum() for n in (1, 2, 3)])
    p = np.array([1, 1 / 2, 1 / 3]) / (1 + 1 / 2 + 1 / 3)
    assert lengths.max() == 3
    assert chi_square(counts, counts.sum() * p) < 40  # leaving out the last favours short ones a little


@pytest.mark.parametrize("maskable", [np.zeros(5, bool), np.array([0, 0, 1, 0, 0], bool)], ids=["none", "one"])
def test_rows_with_little_text(maskable):
    chosen = masking.choose(jax.random.key(0), jnp.arange(5), maskable, 0.15)
    np.testing.assert_array_equal(chosen, maskable)


def test_the_same_key_gives_the_same_mask_and_another_another():
    a, b = (np.asarray(masking.choose(jax.random.key(s), TOKENS[0], MASKABLE[0], 0.15)) for s in (1, 1))
    c = np.asarray(masking.choose(jax.random.key(2), TOKENS[0], MASKABLE[0], 0.15))
    assert (a == b).all() and not (a == c).all()
