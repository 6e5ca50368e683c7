"""word2vec beside gensim: its tree, its tables, and its steps one by one."""

import bisect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.classic.vectors import huffman, noise, word2vec
from llm_jax.classic.vectors.tiles import Tiles, band
from llm_jax.classic.vectors.word2vec import Word2VecConfig

gensim = pytest.importorskip("gensim.models", reason="gensim is not installed")
D, S, RATE = 8, 1, 0.025  # with more draws a word may come twice, and the second one sees the first move
WORDS = [f"w{i}" for i in range(12)]


def sentences(longest):
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 13)
    return [list(rng.choice(WORDS, rng.integers(2, longest + 1), False, p / p.sum())) for _ in range(80)]


def counted(model):
    return np.array([model.wv.get_vecattr(w, "count") for w in model.wv.index_to_key])


def test_tree_noise_and_subsampling():
    rng = np.random.default_rng(1)
    text = [[f"w{i}" for i in rng.zipf(1.3, 20) if i < 3000] for _ in range(1500)]
    model = gensim.Word2Vec(vector_size=4, min_count=1, hs=1, negative=5, sample=1e-3)
    model.build_vocab(text)
    counts = counted(model)
    lengths = np.array([len(model.wv.get_vecattr(w, "code")) for w in model.wv.index_to_key])
    assert (huffman.paths(counts).lengths * counts).sum() == (lengths * counts).sum()  # ties may differ
    np.testing.assert_array_equal(noise.cumulative(counts), model.cum_table)
    keep = np.array([model.wv.get_vecattr(w, "sample_int") for w in model.wv.index_to_key]) / 2**32
    np.testing.assert_allclose(noise.keep_probabilities(counts, 1e-3), np.minimum(keep, 1), atol=1e-7)


def draws(model, count):
    """Negatives in the order in which gensim's one batch draws them."""
    state = np.random.RandomState()
    state.set_state(model.random.get_state())
    number = 2**24 * state.randint(0, 2**24) + state.randint(0, 2**24)
    table, out = model.cum_table.tolist(), []
    for _ in range(count):
        out.append(bisect.bisect_left(table, (number >> 16) % table[-1]))
        number = (number * 25214903917 + 11) & (2**48 - 1)
    return np.array(out, np.int32)


def exact(x):
    return 1 / (1 + np.exp(-x))


def looked_up(x):
    """As gensim has it: a table of 1,000 entries from -6 to 6, but 83 (an integer) of them a unit."""
    return exact((int((x + 6) * 83) / 1000 * 2 - 1) * 6)


def steps(sigmoid, context, rows, turns):
    """Gradient descent on one (contexts, [(row, label), ...]) after the other: both tables."""
    context, predicted = context.astype(np.float64), np.zeros((rows, D))
    for words, targets in turns:
        work, h = np.zeros(D), context[words].mean(0)
        for row, label in targets:
            slope = (label - sigmoid(h @ predicted[row])) * RATE
            work += slope * predicted[row]
            predicted[row] += slope * h
        context[words] += work  # undivided
    return context, predicted


@pytest.mark.parametrize("architecture", word2vec.ARCHITECTURES)
@pytest.mark.parametrize("loss", ["negative_sampling", "hierarchical"])
def test_every_step_of_a_run(architecture, loss):
    """A block of one centre is a step of gensim's: for means always, for pairs in sentences of two words.

    Its sigmoids come from a table, so that a third one stands between: with the table it is gensim's run, without ours.
    """
    text = sentences(5 if architecture == "cbow" else 2)
    of_tree = loss == "hierarchical"
    model = gensim.Word2Vec(
        vector_size=D, window=1, min_count=1, sample=0, seed=3, sg=int(architecture == "skip_gram"), hs=int(of_tree),
        negative=0 if of_tree else S, workers=1, alpha=RATE, min_alpha=RATE,
    )  # fmt: skip
    model.build_vocab(text)
    counts, index = counted(model), model.wv.key_to_index
    points = [model.wv.get_vecattr(w, "point") for w in model.wv.index_to_key] if of_tree else None
    codes = [model.wv.get_vecattr(w, "code") for w in model.wv.index_to_key] if of_tree else None
    rows = len(counts) - of_tree
    rows_of = [[index[w] for w in line] for line in text]
    around = [(line[i - 1] if i else None, line[i], *line[i + 1 : i + 2]) for line in rows_of for i in range(len(line))]
    pairs = [(x, [y for y in (left, *right) if y is not None]) for left, x, *right in around]  # centre, contexts
    assert {len(near) for _, near in pairs} == ({1, 2} if architecture == "cbow" else {1})
    before = np.array(model.wv.vectors)
    if of_tree:
        turns = [(y, list(zip(points[x], 1 - np.array(codes[x], int), strict=True))) for x, y in pairs]
    else:
        negatives = draws(model, len(pairs) * S).reshape(-1, 1, S)
        turns = [
            (y, [(x, 1), *((n, 0) for n in drawn[0] if n != x)]) for (x, y), drawn in zip(pairs, negatives, strict=True)
        ]
    model.train(text, total_examples=len(text), epochs=1)
    between = steps(looked_up, before, rows, turns)
    np.testing.assert_allclose(between[0], model.wv.vectors, rtol=0, atol=1e-6)
    np.testing.assert_allclose(between[1], (model.syn1 if of_tree else model.syn1neg)[:rows], rtol=0, atol=1e-6)
    assert np.abs(between[0] - before).max() > 1e-3 and np.abs(between[1]).max() > 1e-2

    config = Word2VecConfig(
        architecture, loss, D, window=1, negatives=S, shared=S, sample=0, tile=1, block=1, row_rate=1e6
    )
    known = word2vec.make_lookup(config, counts)
    if of_tree:  # ties of counts are broken in other ways
        width = max(map(len, points))
        padded = lambda rows, kind: jnp.asarray([[*r, *[0] * (width - len(r))] for r in rows], kind)
        signs = [[1 - 2 * int(bit) for bit in code] for code in codes]
        known = known._replace(nodes=padded(points, jnp.int32), signs=padded(signs, jnp.float32))

    @jax.jit
    def step(tables, tiles, drawn):
        return word2vec.update(config, tables, tiles, word2vec.touched(config, tiles, drawn, known), known, RATE)

    tables = {"context": jnp.asarray(before), "predicted": jnp.zeros((rows, D))}
    for i, (left, x, *right) in enumerate(around):
        words = [w or 0 for w in (left, x, *(right or [None]))]
        of = np.array([[-1 if left is None else 0, 0, 0 if right else -1]], np.int32)
        tiles = Tiles(np.array([words], np.int32), band(of, np.ones((1, 1), np.int32)))
        tables = step(tables, tiles, None if of_tree else negatives[i])
    expected = steps(exact, before, rows, turns)
    np.testing.assert_allclose(tables["context"], expected[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(tables["predicted"], expected[1], rtol=0, atol=2e-6)
