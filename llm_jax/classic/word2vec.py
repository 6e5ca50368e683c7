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
      log_expected: see `noise.log_expected`, of sampled.
      nodes: see `huffman.Paths`, of hierarchical.
      signs: the same.
    """

    context_scale: jax.Array
    predicted_scale: jax.Array
    cumulative: jax.Array | None = None
    log_expected: jax.Array | None = None
    nodes: jax.Array | None = None
    signs: jax.Array | None = None


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
        return Known(scale(pairs), scale(2 * predicted))
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
      words: int32 `[B, L + 2 W]`.
      sentences: the sentence of each, int32; -1 where there is no word.
      windows: of the centres, int32 `[B, L]`.
    """

    words: jax.Array
    sentences: jax.Array
    windows: jax.Array


def band(tiles: Tiles) -> jax.Array:
    """Which words (m) are in the window of which centre (l): float32 `[B, L, L + 2 W]`."""
    length, width = tiles.windows.shape[1], tiles.words.shape[1]
    reach = (width - length) // 2
    distance = jnp.abs(jnp.arange(length)[:, None] + reach - jnp.arange(width)[None, :])
    near = (distance > 0) & (distance <= tiles.windows[:, :, None])
    own = tiles.sentences[:, reach : reach + length, None]
    return (near & (own == tiles.sentences[:, None, :]) & (own >= 0)).astype(jnp.float32)


def _predicting(config: Word2VecConfig, context_BMD: jax.Array, band_BLM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what predicts, of each centre the weights of what predicts it).

    Skip-gram's are the contexts themselves, `[B, M, D]`; the mean's `[B, L, D]`, with the weights of a diagonal
    `[B, L]`. The gradient of a mean goes undivided to its words, as the program and gensim have it.
    """
    if config.architecture == "skip_gram":
        return context_BMD, band_BLM
    count_BL = band_BLM.sum(-1)
    total_BLD = jnp.einsum("blm,bmd->bld", band_BLM, context_BMD)
    mean_BLD = total_BLD / jnp.maximum(count_BL, 1)[..., None]
    return total_BLD + jax.lax.stop_gradient(mean_BLD - total_BLD), (count_BL > 0).astype(jnp.float32)


def _scores(h: jax.Array, x_BLD: jax.Array, weights: jax.Array) -> jax.Array:
    """Of each centre with what predicts it, shaped as `weights`."""
    return jnp.einsum("bld,bmd->blm" if weights.ndim == 3 else "bld,bld->bl", x_BLD, h)


def _counts(weights: jax.Array, counted_BLS: jax.Array) -> jax.Array:
    """How many pairs of each predicting row count with each drawn word: `[B, M or L, S]`."""
    return jnp.einsum("blm,bls->bms" if weights.ndim == 3 else "bl,bls->bls", weights, counted_BLS)


def _logistic(h, weights, x_BLD, other_BSD, hit_BLS, per_pair: float) -> jax.Array:
    """Negative sampling; a drawn word does not count against the pairs that it is the centre of."""
    against = per_pair * _counts(weights, 1 - hit_BLS)
    own = jnp.sum(weights * jax.nn.softplus(-_scores(h, x_BLD, weights)))
    return own + jnp.sum(against * jax.nn.softplus(jnp.matmul(h, other_BSD.swapaxes(1, 2))))


def _softmax(h, weights, x_BLD, other_BSD, hit_BLS, own_q_BL, other_q_BS) -> jax.Array:
    """Softmax of the centre among itself and the drawn words that it is not."""
    other = jnp.matmul(h, other_BSD.swapaxes(1, 2)) - other_q_BS[:, None, :]
    top = jax.lax.stop_gradient(other.max(-1))
    powers = jnp.exp(other - top[..., None])
    others = jnp.einsum("bms,bls->blm" if weights.ndim == 3 else "bls,bls->bl", powers, 1 - hit_BLS)
    own = _scores(h, x_BLD, weights) - (own_q_BL[..., None] if weights.ndim == 3 else own_q_BL)
    top = top[:, None, :] if weights.ndim == 3 else top
    alone = others <= 0  # no drawn word but itself
    rest = jnp.where(alone, -jnp.inf, jnp.log(jnp.where(alone, 1, others)) + top)
    return jnp.sum(jnp.where(weights > 0, jnp.logaddexp(own, rest) - own, 0))


def _tree(h, weights, nodes_BLPD, signs_BLP) -> jax.Array:
    """One logistic decision a node."""
    if weights.ndim == 3:
        scores, weights = jnp.einsum("bmd,blpd->blpm", h, nodes_BLPD), weights[:, :, None, :]
        signs = signs_BLP[..., None]
    else:
        scores, weights, signs = jnp.einsum("bld,blpd->blp", h, nodes_BLPD), weights[..., None], signs_BLP
    return jnp.sum(weights * jnp.abs(signs) * jax.nn.softplus(-signs * scores))


def loss(
    config: Word2VecConfig, rows: tuple[jax.Array, ...], tiles: Tiles, drawn_BS: jax.Array | None, known: Known
) -> jax.Array:
    """Sum over all pairs of a block, from its gathered rows.

    Args:
      config: of the model.
      rows: contexts `[B, M, D]`; centres `[B, L, D]` and drawn words `[B, S, D]`, or nodes `[B, L, P, D]`.
      tiles: of text.
      drawn_BS: which words were drawn; of full all, `[1, V]`.
      known: see `Known`.
    """
    h, weights = _predicting(config, rows[0], band(tiles))
    reach = (tiles.words.shape[1] - tiles.windows.shape[1]) // 2
    centres_BL = tiles.words[:, reach : reach + tiles.windows.shape[1]]
    if config.loss == "hierarchical":
        return _tree(h, weights, rows[1], known.signs[centres_BL])
    hit_BLS = (drawn_BS[:, None, :] == centres_BL[:, :, None]).astype(jnp.float32)
    if config.loss == "negative_sampling":
        return _logistic(h, weights, *rows[1:], hit_BLS, config.negatives / config.shared)
    q = jnp.zeros(1) if known.log_expected is None else known.log_expected
    own_q, other_q = (q[i] if len(q) > 1 else jnp.zeros(i.shape) for i in (centres_BL, drawn_BS))
    return _softmax(h, weights, *rows[1:], hit_BLS, own_q, other_q)


def _touched(config: Word2VecConfig, tiles: Tiles, key: jax.Array, known: Known, size: int) -> tuple[Any, Any, Any]:
    """(rows of `context`, rows of `predicted` in the order of `loss`, what was drawn)."""
    reach = config.window
    centres_BL = tiles.words[:, reach : reach + tiles.windows.shape[1]]
    if config.loss == "hierarchical":
        return tiles.words, (known.nodes[centres_BL],), None
    if config.loss == "full":
        drawn_BS = jnp.arange(size)[None]
    else:
        drawn_BS = noise.draw(key, known.cumulative, (len(centres_BL), config.shared))
    return tiles.words, (centres_BL, drawn_BS), drawn_BS


def update(
    config: Word2VecConfig, tables: dict[str, jax.Array], tiles: Tiles, key: jax.Array, known: Known, rate: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """A step of gradient descent on the rows that a block touches: (new tables, the block's loss)."""
    context, predicted = tables["context"], tables["predicted"]
    words, others, drawn = _touched(config, tiles, key, known, len(predicted))
    rows = (context[words], *(predicted[i] for i in others))
    value, grads = jax.value_and_grad(lambda r: loss(config, r, tiles, drawn, known))(rows)
    add = lambda table, index, scale, g: table.at[index.reshape(-1)].add(
        (-rate * scale[index][..., None] * g).reshape(-1, config.size)
    )
    context = add(context, words, known.context_scale, grads[0])
    for index, g in zip(others, grads[1:], strict=True):
        predicted = add(predicted, index, known.predicted_scale, g)
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
        tables, value = update(config, tables, tiles, draw_key, known, rate)
        weights = _predicting(config, jnp.zeros((*words.shape, 1)), band(tiles))[1]
        return (tables, total + value, pairs + weights.sum()), None

    keys = jax.random.split(key, len(rates))
    start = (tables, jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(block, start, (batch["words"], batch["sentences"], rates, keys))[0]
