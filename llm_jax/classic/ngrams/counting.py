"""Counts of n-grams as sorted arrays, one of 64-bit keys an order.

The key of an n-gram is `place of its first n - 1 words among the (n - 1)-grams * V + last word`, so that an order of
any length takes one number a row, all continuations of a history lie together, and a search is a binary one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llm_jax.classic.text.sentences import BEGIN

ABSENT = -1


class Counts(NamedTuple):
    """N-grams of every order up to n.

    Attributes:
      size: V.
      keys: sorted, by order; those of single words are 0, ..., V - 1.
      counts: how often each occurs; `<s>` as a word of its own never.
      suffixes: the place of each without its first word, among those of one order less; of single words 0.
    """

    size: int
    keys: list[np.ndarray]
    counts: list[np.ndarray]
    suffixes: list[np.ndarray]


def rank(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys, sorted; how often each occurs; the place of each given key among them)."""
    order = np.argsort(keys)
    ordered = keys[order]
    first = np.append(True, ordered[1:] != ordered[:-1])[: len(keys)]
    positions = np.empty(len(keys), np.int64)
    positions[order] = np.cumsum(first) - 1
    begins = np.flatnonzero(first)
    return ordered[begins], np.diff(np.append(begins, len(keys))), positions


def find(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each key in a sorted table, `ABSENT` where it is not there.

    Keys are looked up in their own order, in which neighbours share cache lines.
    """
    order = np.argsort(keys)
    wanted = keys[order]
    at = np.searchsorted(table, wanted)
    there = at < len(table)
    there[there] = table[at[there]] == wanted[there]
    positions = np.empty(len(keys), np.int64)
    positions[order] = np.where(there, at, ABSENT)
    return positions


def take(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Values at positions, float64; 0 where a place is `ABSENT`."""
    out, there = np.zeros(len(positions)), positions >= 0
    out[there] = values[positions[there]]
    return out


def extend(positions: np.ndarray, text: np.ndarray, size: int) -> np.ndarray:
    """Keys of one order more, of the n-grams that end at each word; `ABSENT` where the sentence began later.

    Args:
      positions: of the (n - 1)-grams that end at each word, `[T]`, `ABSENT` where there is none.
      text: words, `[T]`.
      size: V.
    """
    keys = np.full(len(text), ABSENT, np.int64)
    keys[1:] = positions[:-1] * size + text[1:]
    keys[1:][(positions[:-1] < 0) | (text[1:] == BEGIN)] = ABSENT
    return keys


def check_keys(table: np.ndarray, n: int, size: int) -> None:
    """Refuses keys of order n + 1 that 64 bits do not hold.

    Raises:
      ValueError: with what to do.
    """
    if len(table) * size >= 2**63:
        raise ValueError(f"{len(table):,} {n}-grams of {size:,} words are too many for order {n + 1}: set min_count")


def count(text: np.ndarray, size: int, order: int, progress: bool = False) -> Counts:
    """Counts of all orders up to `order` in numbered sentences (`sentences.read`).

    No n-gram crosses sentences; a history is shorter at their beginnings, where it starts with `<s>`.

    Args:
      text: the sentences, `[T]`.
      size: V.
      order: of the longest n-grams.
      progress: shows a bar.

    Raises:
      ValueError: for orders below 1.
    """
    if order < 1:
        raise ValueError(f"order={order} must be at least 1")
    single = np.bincount(text, minlength=size)
    single[BEGIN] = 0
    out = Counts(size, [np.arange(size)], [single], [np.zeros(size, np.int64)])
    positions = text.astype(np.int64)
    for n in tqdm(range(1, order), unit="order", disable=not progress, desc="counting"):
        check_keys(out.keys[-1], n, size)
        shorter, now = positions, extend(positions, text, size)
        inside = now >= 0
        found, often, there = rank(now[inside])
        positions = np.full(len(text), ABSENT, np.int64)
        positions[inside] = there
        suffix = np.empty(len(found), np.int64)
        suffix[there] = shorter[inside]  # both end at the same word
        out.keys.append(found)
        out.counts.append(often)
        out.suffixes.append(suffix)
    return out


def positions(keys: Sequence[np.ndarray], size: int, text: np.ndarray) -> list[np.ndarray]:
    """Of every order, the place of the n-gram that ends at each word of numbered sentences, or `ABSENT`; each `[T]`."""
    out = [text.astype(np.int64)]
    for table in keys[1:]:
        wanted = extend(out[-1], text, size)
        there = wanted >= 0
        out.append(np.full(len(text), ABSENT, np.int64))
        out[-1][there] = find(table, wanted[there])
    return out


def history(keys: Sequence[np.ndarray], size: int, words: Sequence[int]) -> list[int]:
    """Places of the last no, one, two, ... words of a text as histories, `ABSENT` where one was not seen."""
    last = np.asarray(words, np.int64)[len(words) - len(keys) + 1 :] if len(words) >= len(keys) else np.asarray(words)
    out = [0]
    for n in range(1, len(last) + 1):
        place = int(last[-n])
        for table, word in zip(keys[1:], last[len(last) - n + 1 :], strict=False):
            place = int(find(table, np.array([place * size + word]))[0]) if place != ABSENT else ABSENT
        out.append(place)
    return out


def words_of(keys: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The words of every n-gram, `[N, n]` for every order n."""
    out = [keys[0][:, None]]
    for table in keys[1:]:
        before, word = np.divmod(table, size)
        out.append(np.concatenate([out[-1][before], word[:, None]], axis=1))
    return out
