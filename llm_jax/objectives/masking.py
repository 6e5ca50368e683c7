"""Which tokens a masked language model must guess, and what stands in their place.

Pure functions of a key, for one row; `vmap` them. Static masking is a key that depends on the row alone, dynamic
masking one that depends on the step, n static copies n keys a row.

Sources: Devlin et al. 2019, section 3.1 and appendix A.1 (15 %, of them 80/10/10), https://arxiv.org/abs/1810.04805;
its repository's whole-word option; Lan et al. 2020, section 4.1 (n-grams, p(n) ~ 1/n),
https://arxiv.org/abs/1909.11942; Liu et al. 2019, section 4.1 (dynamic), https://arxiv.org/abs/1907.11692.
"""

import math

import jax
import jax.numpy as jnp

WORD_SLACK = 8  # tokens that a unit may reach over the budget


def budget(length: int, rate: float) -> int:
    """Tokens chosen in a row of `length` that may all be chosen: at least one."""
    return max(1, math.floor(length * rate + 0.5))


def join(key: jax.Array, words_T: jax.Array, longest: int) -> jax.Array:
    """N-grams of consecutive words as units: n in 1..longest with p(n) proportional to 1/n.

    Args:
      key: of the row.
      words_T: number of the word that each token belongs to, ascending from 0.
      longest: words in a unit at most.
    """
    sizes = 1 + jax.random.categorical(key, -jnp.log(jnp.arange(1.0, longest + 1)), shape=words_T.shape)
    return jnp.searchsorted(jnp.cumsum(sizes), words_T, side="right").astype(jnp.int32)


def choose(key: jax.Array, units_T: jax.Array, maskable_T: jax.Array, rate: float) -> jax.Array:
    """Chooses whole units at random until a share of the maskable tokens is reached.

    Units of one token give exactly `round(rate * maskable)` tokens, at least one; of longer units each is taken whose
    middle lies within that number, and none that reaches `WORD_SLACK` over it.

    Args:
      key: of the row.
      units_T: unit of each token, in 0..T-1, equal for the tokens of one unit.
      maskable_T: bool; padding and special tokens are not.
      rate: share.

    Returns:
      `[T]` bool.
    """
    length = units_T.shape[0]
    score_T = jnp.where(maskable_T, jax.random.uniform(key, (length,))[units_T], 2.0)
    order = jnp.lexsort((units_T, score_T))
    rank_T = jnp.zeros(length, jnp.int32).at[order].set(jnp.arange(length, dtype=jnp.int32))
    last_T = jax.ops.segment_max(jnp.where(maskable_T, rank_T, -1), units_T, length)[units_T]
    first_T = jax.ops.segment_min(jnp.where(maskable_T, rank_T, length), units_T, length)[units_T]
    want = jnp.maximum(1, jnp.floor(jnp.sum(maskable_T) * rate + 0.5).astype(jnp.int32))
    within = (first_T + last_T < 2 * want) & (last_T < want + WORD_SLACK)
    return within & maskable_T


def corrupt(
    key: jax.Array, ids_T: jax.Array, chosen_T: jax.Array, mask_id: int, vocab_size: int, mask: float, random: float
) -> jax.Array:
    """Replaces chosen tokens: by `mask_id` (share `mask`), by any entry (share `random`), or by themselves."""
    which, what = jax.random.split(key)
    draw_T = jax.random.uniform(which, ids_T.shape)
    other_T = jax.random.randint(what, ids_T.shape, 0, vocab_size, ids_T.dtype)
    new_T = jnp.where(draw_T < mask, mask_id, jnp.where(draw_T < mask + random, other_T, ids_T))
    return jnp.where(chosen_T, new_T, ids_T)
