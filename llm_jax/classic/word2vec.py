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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.classic import huffman, noise

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
      shared: S, words drawn a tile, of negative_sampling and sampled; weighted to stand for `negatives` a pair.
      exponent: of the counts that negatives are drawn by.
      sample: see `noise.keep_probabilities`; 0 keeps every word.
      subsampling: formula of it.
      tile: L; 0 takes 32, of hierarchical 8, since a centre has many nodes.
      block: words whose gradient is taken at once.
      blocks: a step.
      row_pairs: a row of more expected pairs a block moves by so many times their mean gradient, as the sum of many
        gradients taken at the same place may lead anywhere.
    """

    architecture: str = "skip_gram"
    loss: str = "negative_sampling"
    size: int = 100
    window: int = 5
    dynamic: bool = True
    negatives: int = 5
    shared: int = 32
    exponent: float = 0.75
    sample: float = 1e-3
    subsampling: str = "program"
    tile: int = 0
    block: int = 1024
    blocks: int = 64
    row_pairs: int = 256

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        for name, choices in (("architecture", ARCHITECTURES), ("loss", LOSSES), ("subsampling", noise.FORMULAS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}")
        for name in ("size", "window", "negatives", "shared", "block", "blocks", "row_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.tile < 0 or self.block % self.length:
            raise ValueError(f"block={self.block} must be a multiple of tile={self.length}")

    @property
    def length(self) -> int:
        """L."""
        return self.tile or min(8 if self.loss == "hierarchical" else 32, self.block)

    @property
    def tiles(self) -> int:
        """B, of a block."""
        return self.block // self.length


class Known(NamedTuple):
    """What the vocabulary's counts tell, on the device.

    Attributes:
      context_scale: factor of the gradients of `context`'s rows, `[V]`; see `row_pairs`.
      predicted_scale: of the other table's.
      cumulative: see `noise.cumulative`; None without draws.
      log_expected: log of how often each word is expected among those drawn, of sampled; zeros of full.
      nodes: see `huffman.Paths`, of hierarchical.
      signs: the same.
    """

    context_scale: jax.Array
    predicted_scale: jax.Array
    cumulative: Any = None
    log_expected: Any = None
    nodes: Any = None
    signs: Any = None


def known(config: Word2VecConfig, counts: np.ndarray) -> Known:
    """For a vocabulary of `counts`, `[V]`."""
    stays = counts * noise.keep_probabilities(counts, config.sample, config.subsampling)
    words = config.block * stays / stays.sum()  # expected in a block
    pairs = words * (config.window + 1 if config.dynamic else 2 * config.window)
    predicted = pairs if config.architecture == "skip_gram" else words
    scale = lambda expected: jnp.asarray(np.minimum(1, config.row_pairs / np.maximum(expected, 1e-9)), jnp.float32)
    if config.loss == "hierarchical":
        tree = huffman.paths(counts)
        each = np.abs(tree.signs) * predicted[:, None]
        below = np.bincount(tree.nodes.ravel(), each.ravel(), len(counts) - 1)
        return Known(scale(pairs), scale(below), nodes=jnp.asarray(tree.nodes), signs=jnp.asarray(tree.signs))
    q = noise.shares(counts, config.exponent)
    if config.loss == "full":
        return Known(scale(pairs), scale(2 * predicted), log_expected=jnp.zeros(len(counts)))
    both = predicted + config.negatives * predicted.sum() * q
    if config.loss == "negative_sampling":
        return Known(scale(pairs), scale(both), jnp.asarray(noise.cumulative(counts, config.exponent)))
    log_expected = jnp.asarray(np.log(config.shared * q), jnp.float32)
    return Known(
        scale(pairs), scale(2 * predicted), jnp.asarray(noise.cumulative(counts, config.exponent)), log_expected
    )


def init(config: Word2VecConfig, size: int, key: jax.Array) -> dict[str, jax.Array]:
    """Tables `context` and `predicted`, `[V, D]` (of a tree `[V - 1, D]`): small numbers, and zeros."""
    rows = size - 1 if config.loss == "hierarchical" else size
    context = (jax.random.uniform(key, (size, config.size)) - 0.5) / config.size
    return {"context": context, "predicted": jnp.zeros((rows, config.size))}


class Tiles(NamedTuple):
    """Tiles of text, with their surroundings.

    Attributes:
      words: int32 `[B, M]`, M = L + 2 W.
      sentences: the sentence of each, int32; -1 where there is no word.
      windows: of the centres, int32 `[B, L]`.
    """

    words: jax.Array
    sentences: jax.Array
    windows: jax.Array

    def centres(self, x: jax.Array) -> jax.Array:
        """Of words, those in the middle: `[..., M]` to `[..., L]`."""
        length = self.windows.shape[-1]
        reach = (self.words.shape[-1] - length) // 2
        return x[..., reach : reach + length]


def band(tile: Tiles) -> jax.Array:
    """Which words are in the window of which centre of one tile: float32 `[L, M]`."""
    length, width = len(tile.windows), len(tile.words)
    distance = jnp.abs(jnp.arange(length)[:, None] + (width - length) // 2 - jnp.arange(width)[None, :])
    near = (distance > 0) & (distance <= tile.windows[:, None])
    own = tile.centres(tile.sentences)[:, None]
    return (near & (own == tile.sentences[None, :]) & (own >= 0)).astype(jnp.float32)


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


def touched(config: Word2VecConfig, tiles: Tiles, key: jax.Array, known: Known, size: int) -> Touched:
    """Finds them, and draws words from `key`."""
    centres_BL = tiles.centres(tiles.words)
    if config.loss == "hierarchical":
        return Touched(tiles.words, known.nodes[centres_BL], None)
    if config.loss == "full":
        return Touched(tiles.words, centres_BL, jnp.arange(size))
    return Touched(tiles.words, centres_BL, noise.draw(key, known.cumulative, (len(centres_BL), config.shared)))


class _Pairs(NamedTuple):
    """What predicts the centres of a tile: K vectors that all centres share, or (K = 1) one of each centre.

    Attributes:
      h: contexts `[M, D]`, or means `[L, D]`.
      weights: of each centre with each of its predictors, `[L, K]`.
      shared: whether they are.
    """

    h: jax.Array
    weights: jax.Array
    shared: bool

    def scores(self, x_LD: jax.Array) -> jax.Array:
        """Of centres with their predictors, `[L, K]`."""
        return x_LD @ self.h.T if self.shared else jnp.sum(x_LD * self.h, axis=-1, keepdims=True)

    def counts(self, against_LS: jax.Array) -> jax.Array:
        """Pairs of every predictor that count against drawn words, `[M or L, S]`."""
        return self.weights.T @ against_LS if self.shared else self.weights * against_LS

    def sums(self, values: jax.Array, against_LS: jax.Array) -> jax.Array:
        """Of values `[M or L, S]` over the drawn words that count against a centre, `[L, K]`."""
        if self.shared:
            return against_LS @ values.T
        return jnp.sum(against_LS * values, axis=-1, keepdims=True)

    def of_each(self, values: jax.Array) -> jax.Array:
        """Values of predictors as values of pairs, `[1, M]` or `[L, 1]`."""
        return values[None, :] if self.shared else values[:, None]


def _pairs(config: Word2VecConfig, context_MD: jax.Array, band_LM: jax.Array) -> _Pairs:
    """The gradient of a mean goes undivided to its words, as the program and gensim have it."""
    if config.architecture == "skip_gram":
        return _Pairs(context_MD, band_LM, True)
    count_L1 = jnp.sum(band_LM, axis=-1, keepdims=True)
    total_LD = band_LM @ context_MD
    mean_LD = total_LD / jnp.maximum(count_L1, 1)
    return _Pairs(total_LD + jax.lax.stop_gradient(mean_LD - total_LD), jnp.minimum(count_L1, 1), False)


def _logistic(pairs: _Pairs, x_LD: jax.Array, drawn_SD: jax.Array, against_LS: jax.Array, each: float) -> jax.Array:
    """Negative sampling; `each` drawn word stands for so many of a pair."""
    own = jnp.sum(pairs.weights * jax.nn.softplus(-pairs.scores(x_LD)))
    return own + each * jnp.sum(pairs.counts(against_LS) * jax.nn.softplus(pairs.h @ drawn_SD.T))


def _softmax(
    pairs: _Pairs, x_LD: jax.Array, drawn_SD: jax.Array, against_LS: jax.Array, own_q_L: jax.Array, drawn_q_S: jax.Array
) -> jax.Array:
    """Softmax of a centre among itself and drawn words."""
    drawn = pairs.h @ drawn_SD.T - drawn_q_S[None, :]
    top = jax.lax.stop_gradient(drawn.max(-1))
    others = pairs.sums(jnp.exp(drawn - top[:, None]), against_LS)
    alone = others <= 0  # no drawn word but itself
    rest = jnp.where(alone, -jnp.inf, jnp.log(jnp.where(alone, 1, others)) + pairs.of_each(top))
    own = pairs.scores(x_LD) - own_q_L[:, None]
    return jnp.sum(jnp.where(pairs.weights > 0, jnp.logaddexp(own, rest) - own, 0))


def _tree(pairs: _Pairs, nodes_LPD: jax.Array, signs_LP: jax.Array) -> jax.Array:
    """One logistic decision a node."""
    shape = (*signs_LP.shape, -1)
    if pairs.shared:
        scores = (nodes_LPD.reshape(-1, nodes_LPD.shape[-1]) @ pairs.h.T).reshape(shape)
    else:
        scores = jnp.sum(nodes_LPD * pairs.h[:, None, :], axis=-1, keepdims=True)
    signs = signs_LP[:, :, None]
    return jnp.sum(pairs.weights[:, None, :] * jnp.abs(signs) * jax.nn.softplus(-signs * scores))


def loss(config: Word2VecConfig, rows: Touched, tile: Tiles, drawn_S: Any, known: Known) -> jax.Array:
    """Sum over all pairs of one tile.

    Args:
      config: of the model.
      rows: vectors of what it touches: `[M, D]`; `[L, D]` or `[L, P, D]`; `[S, D]`.
      tile: words `[M]`, sentences, windows `[L]`.
      drawn_S: which words were drawn.
      known: see `Known`.
    """
    pairs, centres_L = _pairs(config, rows.context, band(tile)), tile.centres(tile.words)
    if config.loss == "hierarchical":
        return _tree(pairs, rows.predicted, known.signs[centres_L])
    against_LS = (drawn_S[None, :] != centres_L[:, None]).astype(jnp.float32)
    if config.loss == "negative_sampling":
        return _logistic(pairs, rows.predicted, rows.drawn, against_LS, config.negatives / config.shared)
    own_q, drawn_q = known.log_expected[centres_L], known.log_expected[drawn_S]
    return _softmax(pairs, rows.predicted, rows.drawn, against_LS, own_q, drawn_q)


def block_loss(config: Word2VecConfig, rows: Touched, tiles: Tiles, at: Touched, known: Known) -> jax.Array:
    """`loss` of all tiles together, `[B, ...]` each."""
    drawn_axis = None if config.loss in ("full", "hierarchical") else 0
    row_axes = jax.tree.map(lambda _: 0, rows)._replace(drawn=drawn_axis)
    each = jax.vmap(lambda rows, tile, drawn: loss(config, rows, tile, drawn, known), (row_axes, 0, drawn_axis))
    return jnp.sum(each(rows, tiles, at.drawn))


def update(
    config: Word2VecConfig, tables: dict[str, jax.Array], tiles: Tiles, at: Touched, known: Known, rate: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """A step of gradient descent on the rows that a block touches: (new tables, the block's loss)."""
    context, predicted = tables["context"], tables["predicted"]
    rows = Touched(context[at.context], predicted[at.predicted], None if at.drawn is None else predicted[at.drawn])
    value, grads = jax.value_and_grad(lambda rows: block_loss(config, rows, tiles, at, known))(rows)

    def add(table: jax.Array, index: jax.Array, scale: jax.Array, grad: jax.Array) -> jax.Array:
        moves = -rate * scale[index][..., None] * grad
        return table.at[index.reshape(-1)].add(moves.reshape(-1, config.size))

    context = add(context, at.context, known.context_scale, grads.context)
    predicted = add(predicted, at.predicted, known.predicted_scale, grads.predicted)
    if at.drawn is not None:
        predicted = add(predicted, at.drawn, known.predicted_scale, grads.drawn)
    return {"context": context, "predicted": predicted}, value


def run_blocks(
    config: Word2VecConfig, tables: dict[str, jax.Array], batch: Any, key: jax.Array, known: Known, rates: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """A step: its blocks one after the other.

    Args:
      config: of the model.
      tables: see `init`.
      batch: `words` and `sentences`, int32 `[blocks, B, L + 2 W]`.
      key: of what is drawn.
      known: see `Known`.
      rates: learning rate of each block.

    Returns:
      (new tables, summed loss, pairs).
    """

    def block(carry, x):
        tables, total, pairs = carry
        words, sentences, rate, key = x
        window_key, draw_key = jax.random.split(key)
        shape = (words.shape[0], words.shape[1] - 2 * config.window)
        windows = jnp.full(shape, config.window)
        if config.dynamic:
            windows = jax.random.randint(window_key, shape, 1, config.window + 1, jnp.int32)
        tiles = Tiles(words, sentences, windows)
        at = touched(config, tiles, draw_key, known, len(tables["predicted"]))
        tables, value = update(config, tables, tiles, at, known, rate)
        near = jax.vmap(band)(tiles)
        count = near.sum() if config.architecture == "skip_gram" else near.any(-1).sum().astype(jnp.float32)
        return (tables, total + value, pairs + count), None

    keys = jax.random.split(key, len(rates))
    start = (tables, jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(block, start, (batch["words"], batch["sentences"], rates, keys))[0]
