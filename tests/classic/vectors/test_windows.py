"""Tiles of a sub-sampled text."""

import dataclasses
import functools

import numpy as np
import pytest
import scipy.stats

from llm_jax.classic.vectors import tiles, windows
from llm_jax.classic.vectors.word2vec import Word2VecConfig

CONFIG = Word2VecConfig(window=2, tile=4, block=8, blocks=3)  # 24 words a step


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    return rng.integers(0, 50, 1000).astype(np.int32), np.sort(rng.integers(0, 90, 1000)).astype(np.int32)


Windows = functools.partial(windows.Windows, piece_size=130)  # several pieces of these texts


def seen(batches, config=CONFIG):
    """(words, sentences) of all centres in order."""
    reach = config.window
    return [np.concatenate([b[k][..., reach:-reach].ravel() for b in batches]) for k in ("words", "sentences")]


def test_every_word_is_a_centre_once_an_epoch(text):
    words, sentences = text
    loader = Windows(CONFIG, words, sentences, np.ones(50, np.float32), 2, seed=3)
    assert loader.steps == -(-2000 // 24)
    got, of = seen([next(loader) for _ in range(loader.steps)])
    np.testing.assert_array_equal(got[:2000], np.tile(words, 2))
    np.testing.assert_array_equal(of[:2000], np.tile(sentences, 2))
    assert (of[2000:] == -1).all()


def test_surroundings_go_over_the_ends_of_tiles_and_pieces(text):
    words, sentences = text
    loader = Windows(CONFIG, words, sentences, np.ones(50, np.float32), 1, seed=3)
    batches = [next(loader) for _ in range(loader.steps)]
    rows = np.concatenate([b["words"].reshape(-1, 8) for b in batches])
    padded = np.pad(words, (2, 200))
    for i in range(250):
        np.testing.assert_array_equal(rows[i], padded[4 * i : 4 * i + 8])
    assert (batches[0]["sentences"][0, 0, :2] == -1).all()


def test_what_stays_is_drawn_anew_every_epoch(text):
    words, sentences = text
    keep = np.linspace(0.1, 1, 50).astype(np.float32)
    loader = Windows(CONFIG, words, sentences, keep, 20, seed=3)
    got, of = seen([next(loader) for _ in range(loader.steps)])
    stayed = np.bincount(got[of >= 0], minlength=50)
    total = 20 * np.bincount(words, minlength=50)
    expected = total * keep
    assert stayed.sum() == loader.ends[-1]
    spread = np.sqrt(total * keep * (1 - keep))[:-1]
    z = (stayed[:-1] - expected[:-1]) / spread
    assert scipy.stats.chi2.sf((z**2).sum(), 49) > 1e-3 and stayed[-1] == total[-1]
    first, second = loader._piece(0)[0], loader._piece(8)[0]  # the same words in two epochs
    assert len(first) != len(second) or (first != second).any()


def test_goes_on_from_a_saved_position(text):
    make = lambda: Windows(CONFIG, *text, np.full(50, 0.5, np.float32), 3, seed=1)
    one, two = make(), make()
    for _ in range(7):
        next(one)
    two.restore(one.state())
    expected, got = next(one), next(two)
    for name in ("words", "sentences"):
        np.testing.assert_array_equal(got[name], expected[name])
    assert one.state() == {"step": 8} == two.state()


def test_nothing_to_see(text):
    empty = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="no word of the text is in the vocabulary"):
        Windows(CONFIG, empty, empty, np.ones(3, np.float32), 1, seed=0)
    with pytest.raises(ValueError, match="leaves no word of the text: take a larger one, or 0"):
        Windows(CONFIG, *text, np.zeros(50, np.float32), 1, seed=0)
    with pytest.raises(ValueError, match="no sentence of the text has two words"):
        Windows(CONFIG, text[0], np.arange(1000, dtype=np.int32), np.ones(50, np.float32), 1, seed=0)


def test_no_tile_is_wider_than_sentences(text):
    """A window beyond all of them sees them whole."""
    words, sentences = text[0], np.repeat(np.arange(250, dtype=np.int32), 4)
    config = dataclasses.replace(CONFIG, window=10**6)
    loader = Windows(config, words, sentences, np.ones(50, np.float32), 1, seed=3)
    batch = next(loader)
    assert loader.reach == 3 and batch["words"].shape == (3, 2, 4 + 2 * 3)
    near = tiles.band(batch["sentences"], np.full((3, 2, 4), 10**6))
    np.testing.assert_array_equal(near.sum(-1), 3)
