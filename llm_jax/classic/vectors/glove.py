"""GloVe: word vectors whose products are the logarithms of co-occurrence counts.

Source: Pennington et al. 2014, "GloVe: Global Vectors for Word Representation", https://aclanthology.org/D14-1162; the
factor 1/2 of the loss, the initial values, the defaults and AdaGrad's sums follow the authors' C code (`src/glove.c`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from tqdm import tqdm

from llm_jax.classic.vectors.co_occurrence import CountsError


class Tables(NamedTuple):
    """Word vectors w and context vectors w~, `[V, E]` with E = D + 1: the last column is the bias."""

    words_VE: jax.Array
    contexts_VE: jax.Array


class Pairs(NamedTuple):
    """Co-occurring pairs: word ids, context ids, log x and f(x), `[B]` each; f(x) is 0 for padding."""

    words: jax.Array
    contexts: jax.Array
    log_counts: jax.Array
    weights: jax.Array


def loss(words_BE: jax.Array, contexts_BE: jax.Array, log_counts: jax.Array, weights: jax.Array) -> jax.Array:
    """`1/2 sum f(x) (w . w~ + b + b~ - log x)^2` over a batch of pairs."""
    products = jnp.sum(words_BE[:, :-1] * contexts_BE[:, :-1], axis=1)
    return 0.5 * jnp.sum(weights * (products + words_BE[:, -1] + contexts_BE[:, -1] - log_counts) ** 2)


def step(tables: Tables, squares: Tables, pairs: Pairs, learning_rate: float) -> tuple[Tables, Tables, jax.Array]:
    """One step of AdaGrad on the rows of a batch.

    As in the C code, AdaGrad squares and sums the gradient times the learning rate, and a pair's own square is not yet
    in the sum that divides its update. So a batch of one pair is exactly a step of the C code. In a larger batch the
    squares of the other pairs are in the sum: a frequent word occurs in many pairs, and all update it at once.

    Returns:
      (tables, sums of squares, loss before the step).
    """
    ids = (pairs.words, pairs.contexts)
    rows = [table[i] for table, i in zip(tables, ids, strict=True)]
    value, grads_BE = jax.value_and_grad(loss, (0, 1))(*rows, pairs.log_counts, pairs.weights)
    grads_BE = [learning_rate * g for g in grads_BE]
    squares = Tables(*(s.at[i].add(g**2) for s, i, g in zip(squares, ids, grads_BE, strict=True)))
    moves_BE = [g * jax.lax.rsqrt(s[i] - g**2) for s, i, g in zip(squares, ids, grads_BE, strict=True)]
    return Tables(*(t.at[i].add(-m) for t, i, m in zip(tables, ids, moves_BE, strict=True))), squares, value


@partial(jax.jit, static_argnums=5, donate_argnums=(0, 1))
def _epoch(tables, squares, pairs, key, learning_rate, batch_size):
    def body(state, ids):
        *state, value = step(*state, jax.tree.map(lambda x: x[ids], pairs), learning_rate)
        return tuple(state), value

    order = jax.random.permutation(key, len(pairs.words)).reshape(-1, batch_size)
    (tables, squares), values = jax.lax.scan(body, (tables, squares), order)
    return tables, squares, values.sum()


def train(
    counts: scipy.sparse.csr_matrix,
    key: jax.Array,
    dim: int = 100,
    epochs: int = 25,
    learning_rate: float = 0.05,
    x_max: float = 100.0,
    batch_size: int = 4096,
    progress: bool = False,
) -> tuple[np.ndarray, list[float]]:
    """Trains vectors on co-occurrence counts (`co_occurrence.cooccurrences`; the paper's are harmonic and symmetric).

    Args:
      counts: `[V, V]`, positive where stored.
      key: draws the initial values and the order of pairs.
      dim: D, numbers a vector.
      epochs: passes over all pairs.
      learning_rate: learning rate of AdaGrad, whose sums of squares start at 1.
      x_max: f(x) is `min(1, (x / x_max) ** 0.75)`.
      batch_size: pairs per step.
      progress: whether to show a progress bar.

    Returns:
      (`w + w~` `[V, D]` float32, the mean loss per pair of every epoch).

    Raises:
      CountsError: if the counts are not square, empty or not positive, or a number is not positive.
    """
    numbers = dict(dim=dim, epochs=epochs, learning_rate=learning_rate, x_max=x_max, batch_size=batch_size)
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise CountsError(f"{name}={value} must be a positive number")
    found = counts.tocoo()
    if found.shape[0] != found.shape[1] or not found.nnz:
        raise CountsError(f"counts of shape {found.shape} with {found.nnz} pairs: it must be square and have pairs")
    if not (np.isfinite(found.data).all() and found.data.min() > 0):
        raise CountsError("stored counts must be positive and finite: GloVe fits their logarithms")
    batch_size = min(batch_size, found.nnz)
    logs, weights = np.log(found.data), np.minimum(1.0, found.data / x_max) ** 0.75
    padded = [np.pad(x, (0, -found.nnz % batch_size)) for x in (found.row, found.col, logs, weights)]
    pairs = Pairs(*(jnp.asarray(x, jnp.int32) for x in padded[:2]), *(jnp.asarray(x, jnp.float32) for x in padded[2:]))
    key, start = jax.random.split(key)
    bound = 0.5 / (dim + 1)
    tables = Tables(*jax.random.uniform(start, (2, found.shape[0], dim + 1), jnp.float32, -bound, bound))
    squares, losses = jax.tree.map(jnp.ones_like, tables), []
    for i in tqdm(range(epochs), unit="epoch", disable=not progress, desc="glove"):
        now = jax.random.fold_in(key, i)
        tables, squares, total = _epoch(tables, squares, pairs, now, learning_rate, batch_size)
        losses.append(float(total) / found.nnz)
    return np.asarray(tables.words_VE + tables.contexts_VE)[:, :-1], losses
