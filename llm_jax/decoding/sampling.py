"""The next token from logits: penalties, truncation, sampling; pure functions on `[B, V]`.

The order is that of transformers' `generate`: repetition penalty, n-gram blocking, presence and frequency, then
temperature, top-k, top-p, min-p.

Sources: Keskar et al. 2019 (repetition penalty), https://arxiv.org/abs/1909.05858; Fan et al. 2018 (top-k),
https://arxiv.org/abs/1805.04833; Holtzman et al. 2020 (top-p), https://arxiv.org/abs/1904.09751; Nguyen et al. 2024
(min-p), https://arxiv.org/abs/2407.01082.
"""

import dataclasses

import jax
import jax.numpy as jnp

BANNED = -jnp.inf


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; the defaults are greedy.

    Attributes:
      temperature: 0 takes the most probable token.
      top_k: keep the k most probable, 0 for all.
      top_p: keep the smallest set whose probability reaches p, 1 for all.
      min_p: drop what has less than min_p times the top probability, 0 for none.
      repetition_penalty: logits of tokens seen in prompt or output are divided (positive) or multiplied (negative).
      presence_penalty: subtracted once where a token was generated before.
      frequency_penalty: subtracted once for every time it was generated.
      no_repeat_ngram: no n-gram of prompt and output occurs twice, 0 for no limit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        """Checks ranges."""
        if self.temperature < 0 or self.top_k < 0 or self.no_repeat_ngram < 0:
            raise ValueError("temperature, top_k and no_repeat_ngram must not be negative")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1] and min_p={self.min_p} in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive")

    @property
    def counts_tokens(self) -> bool:
        """Whether token counts are needed."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty) or bool(self.frequency_penalty)


def penalize(logits_BV: jax.Array, prompt_BV: jax.Array, output_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Repetition, presence and frequency penalties.

    Args:
      logits_BV: next-token logits.
      prompt_BV: how often each token stands in the prompt.
      output_BV: how often each token was generated.
      config: strengths.
    """
    if config.repetition_penalty != 1:
        r = config.repetition_penalty
        seen = (prompt_BV + output_BV) > 0
        logits_BV = jnp.where(seen, jnp.where(logits_BV > 0, logits_BV / r, logits_BV * r), logits_BV)
    logits_BV = logits_BV - config.presence_penalty * (output_BV > 0)
    return logits_BV - config.frequency_penalty * output_BV


def block_ngrams(logits_BV: jax.Array, history_BM: jax.Array, length_B: jax.Array, n: int) -> jax.Array:
    """Bans every token that would complete an n-gram already in `history_BM[b, :length_B[b]]`."""
    size = history_BM.shape[1]
    if size < n:
        return logits_BV
    starts = size - n + 1

    def block(logits: jax.Array, history: jax.Array, length: jax.Array) -> jax.Array:
        suffix = jax.lax.dynamic_slice_in_dim(history, jnp.maximum(length - (n - 1), 0), n - 1)
        same = jnp.arange(starts) + n <= length
        for i in range(n - 1):
            same &= history[i : i + starts] == suffix[i]
        hit = jnp.zeros(logits.shape, bool).at[history[n - 1 :]].max(same & (length >= n - 1))
        return jnp.where(hit, BANNED, logits)

    return jax.vmap(block)(logits_BV, history_BM, length_B)


def truncate(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Top-k, then top-p, then min-p, on logits already divided by the temperature."""
    if config.top_k:
        k = min(config.top_k, logits_BV.shape[-1])
        lowest = jax.lax.top_k(logits_BV, k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < lowest, BANNED, logits_BV)
    if config.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1)[:, ::-1]
        p = jax.nn.softmax(ordered, axis=-1)
        nucleus = jnp.cumsum(p, axis=-1) - p < config.top_p  # the mass before a token decides; the first always stays
        lowest = jnp.min(jnp.where(nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest, BANNED, logits_BV)
    if config.min_p:
        floor = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits_BV = jnp.where(logits_BV < floor, BANNED, logits_BV)
    return logits_BV


def choose(logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig) -> jax.Array:
    """The next token of every row, int32 `[B]`; one key a row, so a row's text does not depend on its neighbours."""
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = truncate(logits_BV / config.temperature, config)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
