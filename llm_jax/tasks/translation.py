"""Translations of a run's held-out pairs, and BLEU."""

import itertools
from collections.abc import Sequence

from tqdm import tqdm

from llm_jax import config as configs
from llm_jax.data import corpora
from llm_jax.data.rows import pairs
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.decoding.beam import BeamSearch
from llm_jax.training.run_config import RunConfig

Pair = tuple[str, str]


def read_pairs(config: RunConfig, tokenizer: Tokenizer, limit: int | None = None) -> tuple[list[Pair], list[Pair]]:
    """(pairs trained on, held-out pairs that fit a row, which are those that the run evaluates on).

    Args:
      config: of a run on pairs.
      tokenizer: of the run.
      limit: held-out pairs, the first; None for all.

    Raises:
      ConfigError: for a run that was not trained on pairs.
    """
    data, length = config.data, config.training.sequence_length
    if not data.fields:
        raise configs.ConfigError("data.fields is empty: the run was not trained on pairs")
    splits: dict[str, list[Pair]] = {"train": [], "validation": []}
    for document in corpora.documents(data.source, **data.read_as):
        pair = pairs.both(document, data.fields)
        if pair is not None:
            splits[corpora.split_of(document, data.validation_share)].append(pair)

    def fits(pair: Pair) -> bool:
        return all(len(tokenizer.encode_source(text)) <= length for text in pair)

    return splits["train"], list(itertools.islice(filter(fits, splits["validation"]), limit))


def translate(
    search: BeamSearch, tokenizer: Tokenizer, texts: Sequence[str], length: int, batch_size: int = 32
) -> list[str]:
    """The best translation of every text, of at most `length` tokens; every batch has the same shape."""
    out: list[str] = []
    for start in tqdm(range(0, len(texts), batch_size), unit="batch"):
        sources = [tokenizer.encode_source(text) for text in texts[start : start + batch_size]]
        filled = sources + sources[:1] * (batch_size - len(sources))
        found = search.search(filled, length)[: len(sources)]
        out += [tokenizer.decode(row[0].tokens) for row in found]
    return out


def check_bleu() -> None:
    """Refuses to begin where BLEU could not be measured at the end.

    Raises:
      ValueError: without sacrebleu.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError as e:
        raise ValueError("BLEU needs sacrebleu: pip install 'llm_jax[translate]'") from e


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(score, sacrebleu's line about it), without regard to case."""
    import sacrebleu

    found = sacrebleu.corpus_bleu(list(translations), [list(references)], lowercase=True)
    return found.score, str(found)
