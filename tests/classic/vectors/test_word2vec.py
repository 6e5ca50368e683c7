"""word2vec on tiles, held to loops over pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.classic.vectors import huffman, noise, word2vec
from llm_jax.classic.vectors.tiles import Tiles, band
from llm_jax.classic.vectors.word2vec import Word2VecConfig
from llm_jax.nn import output

V, D, W, L, B, S = 11, 6, 2, 4, 3, 5
COUNTS = np.arange(2 * V, V, -1) ** 2
RNG = np.random.default_rng(0)
TABLES = {n: RNG.normal(size=(V, D)).astype(np.float32) for n in ("context", "predicted")}
TEXT = RNG.integers(0, V, L * B + 2 * W).astype(np.int32)
SENTENCES = np.repeat([-1, 0, 1, -1], [2, 6, 6, 2]).astype(np.int32)
WINDOWS = RNG.integers(1, W + 1, (B, L)).astype(np.int32)
DRAWN = RNG.integers(0, V, (B, S)).astype(np.int32)
tiles_of = lambda x: np.stack([x[i : i + L + 2 * W] for i in range(0, L * B, L)])
TILES = Tiles(tiles_of(TEXT), band(tiles_of(SENTENCES), WINDOWS))
KINDS = [(a, loss) for a in word2vec.ARCHITECTURES for loss in word2vec.LOSSES]


def config_of(architecture, loss, **fields):
    return Word2VecConfig(architecture, loss, size=D, window=W, shared=S, negatives=S, tile=L, block=L * B, **fields)


def pairs():
    """(tile, centre, contexts) of all centres."""
    for i in range(L * B):
        at, window = i + W, WINDOWS.ravel()[i]
        near = [j for j in range(at - window, at + window + 1) if j != at and SENTENCES[j] == SENTENCES[at] >= 0]
        if near:
            yield i // L, TEXT[at], TEXT[near]


def softplus(x):
    return np.logaddexp(0, x)


def one_loss(loss, h, centre, drawn, tree):
    """Of one prediction, from its formula."""
    out = TABLES["predicted"].astype(np.float64)
    scores = out @ h
    if loss == "full":
        return np.logaddexp.reduce(scores) - scores[centre]
    if loss == "negative_sampling":
        return softplus(-scores[centre]) + sum(softplus(scores[d]) for d in drawn if d != centre)
    if loss == "hierarchical":
        return sum(softplus(-s * scores[n]) for n, s in zip(tree.nodes[centre], tree.signs[centre], strict=True) if s)
    scores = scores - np.log(S * noise.shares(COUNTS))
    return np.logaddexp.reduce([scores[centre], *(scores[d] for d in drawn if d != centre)]) - scores[centre]


def touched(config, lookup):
    drawn = DRAWN if config.loss in ("negative_sampling", "sampled") else None
    return word2vec.touched(config, TILES, drawn, lookup)


def undivided(config, context_MD, band_LM, predictors=word2vec._predictors):
    """The same means, whose gradient autodiff does not divide."""
    h, weights = predictors(config, context_MD, band_LM)
    if config.architecture == "cbow":
        total = band_LM @ context_MD
        h = total + jax.lax.stop_gradient(h - total)
    return h, weights


@pytest.mark.parametrize(("architecture", "loss"), KINDS)
def test_a_block_is_the_sum_over_its_pairs(architecture, loss):
    """The loss, and gradient descent on the whole tables by differences of it."""
    config = config_of(architecture, loss, row_rate=1e6)
    tree = huffman.paths(COUNTS) if loss == "hierarchical" else None
    context = TABLES["context"].astype(np.float64)
    expected = 0.0
    for tile, centre, near in pairs():
        inputs = context[near] if architecture == "skip_gram" else [context[near].mean(0)]
        expected += sum(one_loss(loss, h, centre, DRAWN[tile], tree) for h in inputs)
    lookup = word2vec.make_lookup(config, COUNTS)
    at = touched(config, lookup)
    tables = {"context": TABLES["context"], "predicted": TABLES["predicted"][: V - 1 if tree else V]}

    def whole(tables):
        return jnp.sum(word2vec.over_tiles(word2vec.loss, config, word2vec.rows_of(tables, at), TILES, at, lookup))

    @jax.jit
    def both(tables):
        return jax.value_and_grad(whole)(tables), word2vec.update(config, tables, TILES, at, lookup, 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word2vec, "_predictors", undivided)
        (value, grads), moved = both(jax.tree.map(jnp.asarray, tables))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for name, table in tables.items():
        np.testing.assert_allclose(moved[name], table - 0.1 * grads[name], rtol=1e-5, atol=1e-6)


def test_only_touched_rows_move():
    config = config_of("skip_gram", "negative_sampling")
    lookup = word2vec.make_lookup(config, np.full(1000, 7))
    tables = {n: np.asarray(RNG.normal(size=(1000, D)), np.float32) for n in TABLES}
    at = touched(config, lookup)
    moved = jax.jit(lambda t: word2vec.update(config, t, TILES, at, lookup, 0.1))(tables)
    near = np.unique(TEXT[SENTENCES >= 0])
    assert set(np.flatnonzero((moved["context"] != tables["context"]).any(1))) <= set(near)
    assert set(np.flatnonzero((moved["predicted"] != tables["predicted"]).any(1))) <= {*near, *DRAWN.ravel()}


@pytest.mark.parametrize("architecture", word2vec.ARCHITECTURES)
def test_sampling_the_whole_vocabulary_is_the_full_softmax(architecture):
    full, sampled = config_of(architecture, "full"), dataclasses.replace(config_of(architecture, "sampled"), shared=V)
    lookup = word2vec.make_lookup(full, COUNTS)  # whose correction is zero
    at = touched(full, lookup)
    all_words = at._replace(drawn=jnp.tile(jnp.arange(V), (B, 1)))

    @jax.jit
    def both(context, predicted):
        tables = {"context": context, "predicted": predicted}
        tile_losses = lambda c, a: word2vec.over_tiles(word2vec.loss, c, word2vec.rows_of(tables, a), TILES, a, lookup)
        return tile_losses(full, at), tile_losses(sampled, all_words)

    a, b = both(*map(jnp.asarray, TABLES.values()))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_losses_of_scores_say_the_same():
    """`nn.output`'s, which the tiles sum: one centre a row of hidden states."""
    h, labels = RNG.normal(size=(4, D)).astype(np.float32), np.array([0, 3, 10, 3])
    tree = huffman.paths(COUNTS)
    scores = h @ TABLES["predicted"].T
    against = np.where(DRAWN[0] == labels[:, None], 0, output.logistic_loss(-scores[:, DRAWN[0]]))
    got = output.logistic_loss(scores[np.arange(4), labels]) + against.sum(1)
    expected = [one_loss("negative_sampling", x, y, DRAWN[0], None) for x, y in zip(h, labels, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    def path_loss(scores, words):
        signs, nodes = tree.signs[words], tree.nodes[words]
        return jnp.sum(np.abs(signs) * output.logistic_loss(signs * np.take_along_axis(scores, nodes, 1)), 1)

    expected = [one_loss("hierarchical", x, y, None, tree) for x, y in zip(h, labels, strict=True)]
    np.testing.assert_allclose(path_loss(scores, labels), expected, rtol=1e-5)
    sums = [float(jnp.exp(-path_loss(np.tile(row, (V, 1)), np.arange(V))).sum()) for row in scores]
    np.testing.assert_allclose(sums, 1, rtol=1e-6)


@pytest.mark.parametrize(("architecture", "loss"), KINDS)
def test_rows_of_many_terms_move_by_their_mean(architecture, loss):
    """Counted by loops over pairs."""
    config = config_of(architecture, loss)
    tree = huffman.paths(COUNTS) if loss == "hierarchical" else None
    lookup = word2vec.make_lookup(config, COUNTS)
    at = touched(config, lookup)
    total = {n: np.zeros(V) for n in TABLES}
    for tile, centre, near in pairs():
        count, share = (len(near), 1) if architecture == "skip_gram" else (1, 1 / len(near))
        if tree:
            total["context"] += np.bincount(near, minlength=V) * share * tree.lengths[centre]
            total["predicted"] += np.bincount(tree.nodes[centre], np.abs(tree.signs[centre]), V) * count
            continue
        logistic = loss == "negative_sampling"
        total["context"] += np.bincount(near, minlength=V) * share * (1 + S if logistic else 2)
        total["predicted"][centre] += count if logistic else 2 * count
        drawn = np.arange(V) if loss == "full" else DRAWN[tile]
        total["predicted"] += np.bincount(drawn, minlength=V) * count * (S if logistic else 1) / len(drawn)
    tables = {"context": TABLES["context"], "predicted": TABLES["predicted"][: V - 1 if tree else V]}
    few = dataclasses.replace(config, row_rate=0.1)
    free, bounded = jax.jit(
        lambda t: [
            word2vec.update(c, t, TILES, at, lookup, 0.1) for c in (dataclasses.replace(config, row_rate=1e6), few)
        ]
    )(tables)
    for name, table in tables.items():
        scale = np.minimum(1, 1 / np.maximum(total[name][: len(table)], 1))[:, None]
        assert (scale < 1).any()
        np.testing.assert_allclose(bounded[name] - table, (free[name] - table) * scale, rtol=1e-4, atol=1e-6)


def test_what_is_drawn():
    """Windows alike from 1 to W, words by their noise, for every tile anew; all words of a full softmax."""
    config = config_of("skip_gram", "sampled")
    windows, drawn = word2vec.draw(config, jax.random.key(0), word2vec.make_lookup(config, COUNTS), (200, B))
    assert windows.shape == (200, B, L) and drawn.shape == (200, B, S)
    np.testing.assert_allclose(np.mean(np.asarray(windows) == 1), 1 / W, atol=0.03)
    share = np.bincount(np.ravel(drawn), minlength=V) / drawn.size
    np.testing.assert_allclose(share, noise.shares(COUNTS), atol=0.03)
    assert len(np.unique(np.asarray(drawn).reshape(-1, S), axis=0)) > 500
    config = dataclasses.replace(config, dynamic=False, loss="full")
    lookup = word2vec.make_lookup(config, COUNTS)
    windows, drawn = word2vec.draw(config, jax.random.key(0), lookup, (2, B))
    assert (windows == W).all() and drawn is None
    drawn = word2vec.touched(config, TILES, drawn, lookup).drawn
    assert (drawn == np.arange(V)).all() and drawn.shape == (V,)


BAD = {
    "architecture='bow' is not one of skip_gram, cbow": dict(architecture="bow"),
    "loss='softmax' is not one of negative_sampling": dict(loss="softmax"),
    "window=0 must be at least 1": dict(window=0),
    "size=0 must be at least 1": dict(size=0),
    "exponent=nan must be a finite number": dict(exponent=float("nan")),
    "shared=-1 must be at least 0": dict(shared=-1),
    "block=0 must be at least 1": dict(block=0),
    "block=1000 must be a multiple of tile=32": dict(block=1000),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs(message):
    with pytest.raises(ValueError, match=message):
        Word2VecConfig(**BAD[message])
