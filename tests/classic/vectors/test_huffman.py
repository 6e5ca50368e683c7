"""Huffman's tree."""

import itertools

import numpy as np
import pytest

from llm_jax.classic.vectors import huffman


def test_a_tree_by_hand():
    tree = huffman.paths(np.array([5, 2, 1, 1]))
    assert tree.lengths.tolist() == [1, 2, 3, 3]
    ways = [[(int(n), int(s)) for n, s in zip(a, b, strict=True) if s] for a, b in zip(*tree, strict=True)]
    # inner nodes: 0 joins the two rarest, 1 them and the next, 2 all
    assert [[n for n, _ in way] for way in ways] == [[2], [2, 1], [2, 1, 0], [2, 1, 0]]
    assert [s for _, s in ways[2]][:2] == [s for _, s in ways[3]][:2] and ways[2][2][1] == -ways[3][2][1]


@pytest.mark.parametrize("seed", range(3))
def test_words_are_leaves_of_a_full_tree(seed):
    counts = np.random.default_rng(seed).integers(1, 1000, 200)
    tree = huffman.paths(counts)
    assert (0.5**tree.lengths).sum() == 1
    order = np.argsort(-counts, kind="stable")
    assert (np.diff(tree.lengths[order]) >= 0).all() or (np.diff(np.sort(counts)) == 0).any()
    ways = {tuple((n, s) for n, s in zip(a, b, strict=True) if s) for a, b in zip(*tree, strict=True)}
    assert len(ways) == 200


def test_no_tree_has_shorter_ways():
    counts = np.array([7, 5, 3, 2, 2])
    lengths = [x for x in itertools.product(range(1, 5), repeat=5) if sum(0.5**n for n in x) <= 1]
    best = min(int(np.dot(counts, x)) for x in lengths)
    assert np.dot(counts, huffman.paths(counts).lengths) == best


def test_one_word_has_no_tree():
    with pytest.raises(ValueError, match="a tree needs two words, not 1: take a smaller min_count"):
        huffman.paths(np.array([3]))
