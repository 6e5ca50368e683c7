"""word2vec: skip-gram and continuous bag of words, on tiles of text, so that the work is matrix products.

A tile is L centre words with W words of context on either side. Its rows of both tables are gathered once, the scores
of all pairs are one product of which a band counts, and negatives are shared by the tile. The gradient of the sum over
a block of tiles is added to the rows that it touches, and to no others.

As in the original program the context predicts the centre: the first table holds contexts, the second what is
predicted (words, or nodes of Huffman's tree).

Sources: Mikolov et al. 2013, https://arxiv.org/abs/1301.3781 and https://arxiv.org/abs/1310.4546; shared negatives: Ji
et al. 2016, https://arxiv.org/abs/1604.04661.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.classic.vectors import huffman, noise
from llm_jax.classic.vectors.tiles import Tiles, band, draw_windows
from llm_jax.nn.output import choice_loss, logistic_loss
from llm_jax.nn.protocols import Batch

ARCHITECTURES = ("skip_gram", "cbow")
LOSSES = ("negative_sampling", "hierarchical", "sampled", "full")


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    """What is learned, and from what.

    Attributes:
      architecture: skip_gram (every word of the window predicts the centre) or cbow (their mean does).
      loss: negative_sampling (logistic), hierarchical (Huffman's tree), sampled (softmax among drawn words, corrected
        for how often each is drawn) or full (softmax).
      size: D, width of the vectors.
      window: W, words on either side at most.
      dynamic: the window of every centre is drawn from 1..W, so that near words count more.
      negatives: negative words a pair.
      shared: S, words drawn a tile, of negative_sampling and sampled; there weighted to stand for `negatives` a pair. 0
        takes 64, of cbow, which has fewer pairs, 32.
      exponent: of the counts that negatives are drawn by.
      sample: see `noise.keep_probabilities`; 0 keeps every word.
      subsampling: formula of it.
      tile: L; 0 takes 32, of hierarchical 8, since a centre has many nodes.
      block: words whose gradient is taken at once.
      blocks: a step.
      row_rate: most that the learning rate times a row's terms in a block may be (a pair has one term and one a
        negative, or one a node); rows with more move by so many times their mean gradient. A sum of many that are taken
        at the same place may lead anywhere: a text may repeat a word on and on, and Huffman's root is in all pairs.
    """

    architecture: str = "skip_gram"
    loss: str = "negative_sampling"
    size: int = 100
    window: int = 5
    dynamic: bool = True
    negatives: int = 5
    shared: int = 0
    exponent: float = 0.75
    sample: float = 1e-3
    subsampling: str = "program"
    tile: int = 0
    block: int = 512
    blocks: int = 128
    row_rate: float = 2.0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        for name, choices in (("architecture", ARCHITECTURES), ("loss", LOSSES), ("subsampling", noise.FORMULAS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("size", "window", "negatives", "block", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not np.isfinite(self.exponent):
            raise ValueError(f"exponent={self.exponent} must be a finite number")
        if not self.row_rate > 0:
            raise ValueError(f"row_rate={self.row_rate} must be positive")
        if self.shared < 0:
            raise ValueError(f"shared={self.shared} must be at least 0")
        if self.tile < 0 or self.block % self.length:
            raise ValueError(f"block={self.block} must be a multiple of tile={self.length}")

    @property
    def length(self) -> int:
        """L, centre words of a tile."""
        return self.tile or min(8 if self.loss == "hierarchical" else 32, self.block)

    @property
    def draws(self) -> int:
        """S, words drawn for a tile."""
        return self.shared or (32 if self.architecture == "cbow" else 64)

    @property
    def tiles(self) -> int:
        """B, tiles of a block."""
        return self.block // self.length


class Lookup(NamedTuple):
    """What the vocabulary's counts tell, on the device.

    Attributes:
      cumulative: see `noise.cumulative`; None without draws.
      log_expected: log of how often each word is expected among those drawn, of sampled; zeros of full.
      nodes: see `huffman.Paths`, of hierarchical.
      signs: the same.
    """

    cumulative: Any = None
    log_expected: Any = None
    nodes: Any = None
    signs: Any = None


def make_lookup(config: Word2VecConfig, counts: np.ndarray) -> Lookup:
    """Tables for a vocabulary whose words occur `counts` times, `[V]`."""
    if config.loss == "hierarchical":
        tree = huffman.paths(counts)
        return Lookup(nodes=jnp.asarray(tree.nodes), signs=jnp.asarray(tree.signs))
    if config.loss == "full":
        return Lookup(log_expected=jnp.zeros(len(counts)))
    q, drawn = noise.shares(counts, config.exponent), jnp.asarray(noise.cumulative(counts, config.exponent))
    expected = jnp.asarray(np.log(config.draws * q), jnp.float32) if config.loss == "sampled" else None
    return Lookup(drawn, expected)


def init(config: Word2VecConfig, size: int, key: jax.Array) -> dict[str, jax.Array]:
    """Tables `context` and `predicted`, `[V, D]` (of a tree `[V - 1, D]`): small numbers, and zeros."""
    rows = size - 1 if config.loss == "hierarchical" else size
    context = (jax.random.uniform(key, (size, config.size)) - 0.5) / config.size
    return {"context": context, "predicted": jnp.zeros((rows, config.size))}


class Touched(NamedTuple):
    """Rows that tiles touch.

    Attributes:
      context: `[B, M]`.
      predicted: centres `[B, L]`; of hierarchical their nodes `[B, L, P]`.
      drawn: `[B, S]`; of full all words, `[V]`; None of hierarchical.
    """

    context: jax.Array
    predicted: jax.Array
    drawn: Any


def touched(config: Word2VecConfig, tiles: Tiles, drawn: Any, lookup: Lookup) -> Touched:
    """The rows that tiles touch; `drawn` are the words drawn for them, but for `full`, which draws all words."""
    of_tree = config.loss == "hierarchical"
    if config.loss == "full":
        drawn = jnp.arange(len(lookup.log_expected))
    return Touched(tiles.words, lookup.nodes[tiles.centres] if of_tree else tiles.centres, drawn)


class _Scores(NamedTuple):
    """Products of a tile's rows.

    A centre has K predictors: all contexts of the tile (skip-gram), or one, the mean of its contexts (CBOW).

    Attributes:
      centre: of centres `[L, K]`, or of their nodes `[L, P, K]`, with their predictors.
      drawn: of predictors with drawn words: `[K, S]`, of means `[L, S]`; None without.
    """

    centre: jax.Array
    drawn: Any


def _turned(x: jax.Array) -> jax.Array:
    """A transpose that is written out: XLA:CPU takes slow loops for products whose first factor is read across."""
    return jax.lax.optimization_barrier(x.T)


def _is_mean(config: Word2VecConfig) -> bool:
    return config.architecture == "cbow"


def _predictors(config: Word2VecConfig, context_MD: jax.Array, band_LM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what predicts: contexts `[M, D]` or means `[L, D]`; which centres by which, `[L, K]`)."""
    if not _is_mean(config):
        return context_MD, band_LM
    count_L1 = jnp.sum(band_LM, axis=-1, keepdims=True)
    return band_LM @ context_MD / jnp.maximum(count_L1, 1), jnp.minimum(count_L1, 1)


def _scores(config: Word2VecConfig, h: jax.Array, rows: Touched) -> _Scores:
    x = rows.predicted
    if not _is_mean(config):
        centre = (x.reshape(-1, config.size) @ h.T).reshape(*x.shape[:-1], len(h))
    elif config.loss == "hierarchical":
        centre = jnp.sum(x * h[:, None, :], axis=-1, keepdims=True)
    else:
        centre = jnp.sum(x * h, axis=-1, keepdims=True)
    return _Scores(centre, None if rows.drawn is None else h @ rows.drawn.T)


def _logistic(config: Word2VecConfig, scores: _Scores, weights_LK: jax.Array, against_LS: jax.Array) -> jax.Array:
    """Negative sampling; a drawn word stands for `negatives` / S of each pair that it is not the centre of."""
    counts = weights_LK * against_LS if _is_mean(config) else _turned(weights_LK) @ against_LS
    against = config.negatives / config.draws * jnp.sum(counts * logistic_loss(-scores.drawn))
    return jnp.sum(weights_LK * logistic_loss(scores.centre)) + against


def _softmax(
    config: Word2VecConfig,
    scores: _Scores,
    weights_LK: jax.Array,
    against_LS: jax.Array,
    centre_q_L: jax.Array,
    drawn_q_S: jax.Array,
) -> jax.Array:
    """Softmax of a centre among itself and the drawn words that it is not."""
    drawn = scores.drawn - drawn_q_S[None, :]
    top = jax.lax.stop_gradient(jnp.max(drawn, axis=-1, keepdims=True))
    powers = jnp.exp(drawn - top)
    if _is_mean(config):
        others_LK, top_LK = jnp.sum(against_LS * powers, axis=-1, keepdims=True), top
    else:
        others_LK, top_LK = _turned(powers @ against_LS.T), top.T
    alone = others_LK <= 0  # no drawn word but itself
    rest = jnp.where(alone, -jnp.inf, jnp.log(jnp.where(alone, 1, others_LK)) + top_LK)
    centre = scores.centre - centre_q_L[:, None]
    return jnp.sum(jnp.where(weights_LK > 0, choice_loss(centre, rest), 0))


def _tree(scores: _Scores, weights_LK: jax.Array, signs_LP: jax.Array) -> jax.Array:
    """Loss with one logistic decision per node."""
    signs = signs_LP[:, :, None]
    return jnp.sum(weights_LK[:, None, :] * jnp.abs(signs) * logistic_loss(signs * scores.centre))


def _loss(
    config: Word2VecConfig, scores: _Scores, weights_LK: jax.Array, centres_L: jax.Array, drawn_S: Any, lookup: Lookup
) -> jax.Array:
    if config.loss == "hierarchical":
        return _tree(scores, weights_LK, lookup.signs[centres_L])
    against_LS = (drawn_S[None, :] != centres_L[:, None]).astype(jnp.float32)
    if config.loss == "negative_sampling":
        return _logistic(config, scores, weights_LK, against_LS)
    own_q, drawn_q = lookup.log_expected[centres_L], lookup.log_expected[drawn_S]
    return _softmax(config, scores, weights_LK, against_LS, own_q, drawn_q)


def loss(config: Word2VecConfig, rows: Touched, tile: Tiles, drawn_S: Any, lookup: Lookup) -> jax.Array:
    """Sum over all pairs of one tile.

    Args:
      config: of the model.
      rows: vectors of what it touches: `[M, D]`; `[L, D]` or `[L, P, D]`; `[S, D]`.
      tile: words `[M]`, near `[L, M]`.
      drawn_S: which words were drawn.
      lookup: see `Lookup`.
    """
    h, weights_LK = _predictors(config, rows.context, tile.near)
    return _loss(config, _scores(config, h, rows), weights_LK, tile.centres, drawn_S, lookup)


def gradient(config: Word2VecConfig, rows: Touched, tile: Tiles, drawn_S: Any, lookup: Lookup) -> Touched:
    """The gradient of `loss`, by rows; that of a mean goes undivided to its words, as the program and gensim have it.

    Only the slopes of scores are left to autodiff, whose products of rows have their first factor across (`_turned`).
    """
    h, weights_LK = _predictors(config, rows.context, tile.near)
    scores = _scores(config, h, rows)
    slopes = jax.grad(lambda s: _loss(config, s, weights_LK, tile.centres, drawn_S, lookup))(scores)
    x = rows.predicted
    if not _is_mean(config):
        centre = slopes.centre.reshape(-1, len(h))
        d_x, d_h = (centre @ h).reshape(x.shape), _turned(centre) @ x.reshape(-1, config.size)
    elif config.loss == "hierarchical":
        d_x, d_h = slopes.centre * h[:, None, :], jnp.sum(slopes.centre * x, axis=1)
    else:
        d_x, d_h = slopes.centre * h, slopes.centre * x
    d_drawn = None
    if rows.drawn is not None:
        d_h, d_drawn = d_h + slopes.drawn @ rows.drawn, _turned(slopes.drawn) @ h
    return Touched(_turned(tile.near) @ d_h if _is_mean(config) else d_h, d_x, d_drawn)


def terms(config: Word2VecConfig, tile: Tiles, drawn_S: Any, lookup: Lookup) -> Touched:
    """How many terms of a tile's loss each row stands in: `[M]`; `[L]` or `[L, P]`; `[S]`; a share of a mean as one."""
    near_LM, pairs_L = tile.near, jnp.sum(tile.near, axis=-1)
    if _is_mean(config):
        near_LM, pairs_L = near_LM / jnp.maximum(pairs_L, 1)[:, None], jnp.minimum(pairs_L, 1)
    if config.loss == "hierarchical":
        steps_LP = jnp.abs(lookup.signs[tile.centres])
        return Touched(jnp.sum(steps_LP, axis=-1) @ near_LM, steps_LP * pairs_L[:, None], None)
    logistic = config.loss == "negative_sampling"
    each = 1 + config.negatives if logistic else 2  # of a softmax: its label, and the rest
    drawn = jnp.sum(pairs_L) * (config.negatives if logistic else 1) / len(drawn_S)
    centre_L = pairs_L if logistic else 2 * pairs_L
    return Touched(each * jnp.sum(near_LM, axis=0), centre_L, jnp.full(len(drawn_S), drawn))


def over_tiles(
    function: Callable[..., Any], config: Word2VecConfig, rows: Touched, tiles: Tiles, at: Touched, lookup: Lookup
) -> Any:
    """`loss` or `gradient` of every tile of a block, `[B, ...]` each."""
    drawn_axis = 0 if at.drawn is not None and at.drawn.ndim == 2 else None
    row_axes = jax.tree.map(lambda _: 0, rows)._replace(drawn=drawn_axis)
    each = lambda rows, tile, drawn: function(config, rows, tile, drawn, lookup)
    return jax.vmap(each, (row_axes, 0, drawn_axis))(rows, tiles, at.drawn)


def rows_of(tables: dict[str, jax.Array], at: Touched) -> Touched:
    """Gathers the vectors that a step reads."""
    context, predicted = tables["context"], tables["predicted"]
    return Touched(context[at.context], predicted[at.predicted], None if at.drawn is None else predicted[at.drawn])


def update(
    config: Word2VecConfig, tables: dict[str, jax.Array], tiles: Tiles, at: Touched, lookup: Lookup, rate: jax.Array
) -> dict[str, jax.Array]:
    """A step of gradient descent on the rows that a block touches."""
    context, predicted = tables["context"], tables["predicted"]
    rows = rows_of(tables, at)
    counted = lambda config, rows, *tile: terms(config, *tile)
    grads, counts = (over_tiles(f, config, rows, tiles, at, lookup) for f in (gradient, counted))
    if config.loss == "full":  # all tiles drew the same words
        grads, counts = (x._replace(drawn=jnp.sum(x.drawn, axis=0)) for x in (grads, counts))

    def descend(table: jax.Array, *touched: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        flat = ((i.ravel(), g.reshape(-1, config.size), n.ravel()) for i, g, n in touched)
        index, grad, count = (jnp.concatenate(x) for x in zip(*flat, strict=True))
        total = jnp.zeros(len(table)).at[index].add(count)
        scale = jnp.minimum(rate, config.row_rate / jnp.maximum(total, 1))
        return table.at[index].add(-scale[index, None] * grad)

    chosen = [(at.predicted, grads.predicted, counts.predicted)]
    if at.drawn is not None:
        chosen.append((at.drawn, grads.drawn, counts.drawn))
    context = descend(context, (at.context, grads.context, counts.context))
    return {"context": context, "predicted": descend(predicted, *chosen)}


def draw(config: Word2VecConfig, key: jax.Array, lookup: Lookup, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """(windows of centres, int32 `[..., L]`; words for tiles, `[..., S]`, if any are drawn) for tiles of `shape`.

    All of a step's at once: a device draws few numbers in as much time as many.
    """
    window_key, draw_key = jax.random.split(key)
    windows = draw_windows(window_key, (*shape, config.length), config.window, config.dynamic)
    if config.loss in ("hierarchical", "full"):
        return windows, None
    return windows, noise.draw(draw_key, lookup.cumulative, (*shape, config.draws))


def mean_loss(
    config: Word2VecConfig, tables: dict[str, jax.Array], tiles: Tiles, at: Touched, lookup: Lookup
) -> jax.Array:
    """The mean loss of a pair over the tiles of a block."""
    pairs = jnp.sum(jnp.any(tiles.near > 0, axis=-1) if _is_mean(config) else tiles.near)
    return jnp.sum(over_tiles(loss, config, rows_of(tables, at), tiles, at, lookup)) / jnp.maximum(pairs, 1)


def run_blocks(
    config: Word2VecConfig, tables: dict[str, jax.Array], batch: Batch, key: jax.Array, lookup: Lookup, rates: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """A step: its blocks one after the other.

    Args:
      config: of the model.
      tables: see `init`.
      batch: `words` and `sentences`, int32 `[blocks, B, M]`; M may be less than L + 2 W where sentences are short.
      key: of what is drawn.
      lookup: see `Lookup`.
      rates: learning rate of each block.

    Returns:
      (new tables; mean loss of a pair of the first block, before its step).
    """
    windows, drawn = draw(config, key, lookup, batch["words"].shape[:2])

    def block(words, sentences, windows, drawn):
        tiles = Tiles(words, jax.lax.optimization_barrier(band(sentences, windows)))
        return tiles, touched(config, tiles, drawn, lookup)

    xs = batch["words"], batch["sentences"], windows, drawn
    value = mean_loss(config, tables, *block(*jax.tree.map(lambda x: x[0], xs)), lookup)
    step = lambda tables, x: (update(config, tables, *block(*x[0]), lookup, x[1]), None)
    return jax.lax.scan(step, tables, (xs, rates))[0], value
