"""Texts made into pairs: spans to be restored, or a beginning to be continued.

Pure functions of a key, for one row; `vmap` them. How much is taken out depends on the length alone, so that shapes
are static and nothing is padded.

Source: Raffel et al. 2020, sections 3.1.4 and 3.2.1, https://arxiv.org/abs/1910.10683.
"""

import jax
import jax.numpy as jnp

from llm_jax.objectives.objective import IGNORED


def sizes(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(tokens taken out, spans) of a row.

    Raises:
      ValueError: if no span fits beside a token that stays.
    """
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    if noise < 1 or length - noise < spans:
        raise ValueError(
            f"a text of {length} tokens is too short for span corruption with noise_density={noise_density} and "
            f"mean_span={mean_span}: every span needs a token that stays before it"
        )
    return noise, spans


def lengths(length: int, noise_density: float, mean_span: float, ends: bool) -> tuple[int, int]:
    """Tokens of source and target that `corrupt` makes of a row."""
    noise, spans = sizes(length, noise_density, mean_span)
    return length - noise + spans + ends, noise + spans + ends


def fitting(source_length: int, noise_density: float, mean_span: float, ends: bool) -> int:
    """The longest row whose source has at most `source_length` tokens."""
    length = source_length
    while lengths(length + 1, noise_density, mean_span, ends)[0] <= source_length:
        length += 1
    return length


def _partition(key: jax.Array, total: int, parts: int) -> jax.Array:
    """Sizes `[parts]` of a uniformly drawn partition of `total` into non-empty parts."""
    borders = jax.random.permutation(key, jnp.arange(total - 1) < parts - 1)
    part = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(borders.astype(jnp.int32))])
    return jnp.zeros(parts, jnp.int32).at[part].add(1)


def noise_mask(key: jax.Array, length: int, noise_density: float, mean_span: float) -> jax.Array:
    """`[length]` bool, True where taken out: spans and what stays between them in turn, beginning with what stays."""
    noise, spans = sizes(length, noise_density, mean_span)
    first, second = jax.random.split(key)
    left, taken = _partition(first, length - noise, spans), _partition(second, noise, spans)
    ends = jnp.cumsum(jnp.stack([left, taken], axis=1).reshape(-1))
    return jnp.searchsorted(ends, jnp.arange(length), side="right") % 2 == 1


def _replace_runs(ids_T: jax.Array, mask_T: jax.Array, vocab_size: int, size: int, end_id: int | None) -> jax.Array:
    """Each run of True becomes one sentinel, counted down from the last entry."""
    begins = mask_T & ~jnp.concatenate([jnp.zeros(1, bool), mask_T[:-1]])
    sentinels = vocab_size - jnp.cumsum(begins.astype(ids_T.dtype))
    tokens = jnp.where(begins, sentinels, ids_T)
    stays = begins | ~mask_T
    place = jnp.where(stays, jnp.cumsum(stays) - 1, size)
    out = jnp.full(size, 0 if end_id is None else end_id, ids_T.dtype)
    return out.at[place].set(tokens, mode="drop")


def corrupt(
    key: jax.Array, ids_T: jax.Array, noise_density: float, mean_span: float, vocab_size: int, end_id: int | None
) -> tuple[jax.Array, jax.Array]:
    """T5's pre-training pair: the text with a sentinel for every span, and the spans with theirs.

    Args:
      key: of the row.
      ids_T: the text.
      noise_density: share taken out.
      mean_span: mean length of a span.
      vocab_size: sentinel i (from 0) is entry `vocab_size - 1 - i`, as T5's `<extra_id_i>`.
      end_id: ends both, None for nothing.

    Returns:
      (source, target), of the sizes that `lengths` gives.
    """
    ids_T, length = jnp.asarray(ids_T), ids_T.shape[0]
    mask_T = noise_mask(key, length, noise_density, mean_span)
    source, target = lengths(length, noise_density, mean_span, end_id is not None)
    return (
        _replace_runs(ids_T, mask_T, vocab_size, source, end_id),
        _replace_runs(ids_T, ~mask_T, vocab_size, target, end_id),
    )


def restore(source: list[int], target: list[int], vocab_size: int, num_spans: int, end_id: int | None) -> list[int]:
    """Undoes `corrupt`: the text."""
    sentinels = set(range(vocab_size - num_spans, vocab_size))
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in target:
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token != end_id or end_id is None:
            current.append(token)
    out: list[int] = []
    for token in source:
        out += spans[token] if token in sentinels else [] if token == end_id else [token]
    return out


def cut(key: jax.Array, ids_T: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Prefix LM: a text cut at a uniformly drawn place in 1..T-1.

    Returns:
      (source with its `attention_mask`, labels): both `[T]`, the labels moved to the front, -100 behind them.
    """
    length = ids_T.shape[0]
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be cut into a prefix and the rest")
    place = jax.random.randint(key, (), 1, length)
    index = jnp.arange(length)
    rest = jnp.roll(ids_T, -place)
    labels = jnp.where(index < length - place, rest, IGNORED)
    before = (index < place).astype(jnp.int32)
    return {"input_ids": jnp.where(before > 0, ids_T, 0), "attention_mask": before}, labels
