"""The baseline of a translator: each word by the one it is most often aligned with.

Source: Brown et al. 1993, model 1, https://aclanthology.org/J93-2003.
"""

import collections
import re
from collections.abc import Iterable

WORDS = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and marks, in lower case."""
    return WORDS.findall(text.lower())


def learn(pairs: Iterable[tuple[str, str]], rounds: int = 5, kept: int = 20) -> dict[str, str]:
    """`{source word: target word}` of the highest probability after some rounds of expectation maximisation.

    Args:
      pairs: sources and targets.
      rounds: of EM.
      kept: target words that a source word keeps between rounds; the others' probabilities are small.
    """
    both = [(words_of(a), words_of(b)) for a, b in pairs]
    table: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        counts: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        for source, target in both:
            probabilities = [(s, table.get(s)) for s in source]
            for t in target:
                shares = [1.0 if row is None else row.get(t, 1e-6) for _, row in probabilities]
                total = sum(shares)
                for (s, _), share in zip(probabilities, shares, strict=True):
                    counts[s][t] += share / total
        table = {}
        for s, row in counts.items():
            best = sorted(row.items(), key=lambda x: -x[1])[:kept]
            total = sum(row.values())
            table[s] = {t: c / total for t, c in best}
    return {s: max(row, key=lambda t: row[t]) for s, row in table.items()}


def translate(lexicon: dict[str, str], text: str) -> str:
    """Word by word; unknown ones stay. Marks are joined to what stands before them."""
    out = " ".join(lexicon.get(w, w) for w in words_of(text))
    return re.sub(r"\s+([^\w\s])", r"\1", out)
