"""Tiles and their bands."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from llm_jax.classic.vectors import tiles

SENTENCES = np.array([[-1, 0, 0, 1, 1, 1, 1, -1], [1, 1, 1, 1, 2, 2, 2, 3]], np.int32)
WINDOWS = np.array([[1, 2, 2, 1], [2, 2, 1, 2]], np.int32)


def test_band_pair_by_pair():
    near = np.asarray(tiles.band(SENTENCES, WINDOWS))
    assert near.shape == (2, 4, 8)
    for b, i, j in np.ndindex(near.shape):
        at = i + 2
        own, other = SENTENCES[b, at], SENTENCES[b, j]
        assert near[b, i, j] == (0 < abs(at - j) <= WINDOWS[b, i] and own == other >= 0)


def test_centres_stand_in_the_middle():
    words = np.arange(16).reshape(2, 8)
    several = tiles.Tiles(words, tiles.band(SENTENCES, WINDOWS))
    np.testing.assert_array_equal(several.centres, words[:, 2:6])
    one = jax.tree.map(lambda x: x[1], several)
    np.testing.assert_array_equal(one.centres, words[1, 2:6])


def test_near_words_count_more():
    """Pairs at distance d are in (W - d + 1) / W of the windows."""
    windows = tiles.draw_windows(jax.random.key(1), (500, 8), 4, True)
    near = np.asarray(tiles.band(jnp.zeros((500, 16), jnp.int32), windows))
    for distance in range(1, 5):
        counts = [near[:, i, i + 4 + side * distance].sum() for i in range(8) for side in (-1, 1)]
        assert scipy.stats.binomtest(int(sum(counts[::2])), 4000, (4 - distance + 1) / 4).pvalue > 1e-3
        assert counts[::2] == counts[1::2]
    assert near[:, np.arange(8), np.arange(8) + 4].sum() == 0
    assert (tiles.draw_windows(jax.random.key(1), (3, 2), 4, False) == 4).all()
