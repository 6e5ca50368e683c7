"""What is drawn for word vectors: which words of a text stay, and words from the noise distribution.

Sources: Mikolov et al. 2013, https://arxiv.org/abs/1310.4546, sections 2.2 and 2.3; its program, word2vec.c.
"""

import jax
import jax.numpy as jnp
import numpy as np

FORMULAS = ("program", "paper")
TOP = 2**31 - 1  # what cumulative counts are scaled to


def keep_probabilities(counts: np.ndarray, threshold: float, formula: str = "program") -> np.ndarray:
    """How often each word stays in the text (sub-sampling), float32 `[V]`.

    Args:
      counts: of words, `[V]`.
      threshold: words of a lower frequency stay (`program`: of about 2.6 times that); 0 keeps all.
      formula: with f the frequency and t the threshold, `program` keeps (sqrt(f / t) + 1) t / f, as word2vec.c and
        gensim do; `paper` keeps sqrt(t / f).

    Raises:
      ValueError: for another formula or a negative threshold.
    """
    if formula not in FORMULAS:
        raise ValueError(f"subsampling={formula!r} is not one of {', '.join(FORMULAS)}")
    if not threshold >= 0:
        raise ValueError(f"sample={threshold} must be at least 0")
    if threshold == 0:
        return np.ones(len(counts), np.float32)
    rarity = threshold * counts.sum() / counts  # t / f
    keep = np.sqrt(rarity) + (rarity if formula == "program" else 0)
    return np.minimum(keep, 1).astype(np.float32)


def shares(counts: np.ndarray, exponent: float = 0.75) -> np.ndarray:
    """The noise distribution, counts to a power: `[V]`, sums to one."""
    weights = counts.astype(np.float64) ** exponent
    return weights / weights.sum()


def cumulative(counts: np.ndarray, exponent: float = 0.75) -> np.ndarray:
    """Sums of the noise distribution, scaled to end at 2**31 - 1: int32 `[V]`."""
    return np.round(np.cumsum(shares(counts, exponent)) * TOP).astype(np.int32)


def draw(key: jax.Array, cumulative_V: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Words in the proportions that `cumulative_V` tells, int32."""
    ticket = jax.random.randint(key, shape, 0, TOP, jnp.int32)
    return jnp.searchsorted(cumulative_V, ticket, side="right", method="scan_unrolled").astype(jnp.int32)
