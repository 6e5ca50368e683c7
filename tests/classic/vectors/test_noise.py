"""Sub-sampling, and the noise that negatives are drawn from."""

import jax
import numpy as np
import pytest
import scipy.stats

from llm_jax.classic.vectors import noise

COUNTS = np.array([60_000, 9_000, 900, 100])


def test_frequent_words_stay_less_often():
    f, t = COUNTS / COUNTS.sum(), 1e-2
    paper = noise.keep_probabilities(COUNTS, t, "paper")
    np.testing.assert_allclose(paper, np.minimum(1, np.sqrt(t / f)), rtol=1e-6)
    program = noise.keep_probabilities(COUNTS, t)
    np.testing.assert_allclose(program, np.minimum(1, (np.sqrt(f / t) + 1) * t / f), rtol=1e-6)
    assert (program >= paper).all() and paper[-1] == 1 and (noise.keep_probabilities(COUNTS, 0) == 1).all()


def test_draws_follow_the_power_of_counts():
    q = noise.shares(COUNTS, 0.75)
    np.testing.assert_allclose(q, COUNTS**0.75 / (COUNTS**0.75).sum())
    table = noise.cumulative(COUNTS, 0.75)
    assert table[-1] == noise.TOP
    drawn = np.asarray(noise.draw(jax.random.key(0), table, (20_000,)))
    seen = np.bincount(drawn, minlength=4)
    assert scipy.stats.chisquare(seen, q * 20_000).pvalue > 1e-3
    flat = np.bincount(np.asarray(noise.draw(jax.random.key(0), noise.cumulative(COUNTS, 0.0), (20_000,))))
    assert scipy.stats.chisquare(flat).pvalue > 1e-3


def test_bad_options():
    with pytest.raises(ValueError, match="subsampling='log' is not one of program, paper"):
        noise.keep_probabilities(COUNTS, 1e-3, "log")
    with pytest.raises(ValueError, match="sample=-1 must be at least 0"):
        noise.keep_probabilities(COUNTS, -1)
