"""What a run with each objective reads: one row an objective in `RECIPES`.

The way of a text: `data.tokens` stores the ids of a file's documents, a function here cuts the ids into rows
(`data.rows`), and `data.loader` puts rows into batches, which the objective's `prepare` takes.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from etils import epath

from llm_jax import config as configs
from llm_jax.data import corpora, tokens
from llm_jax.data.rows import packing, pairs
from llm_jax.data.rows.masked import FramedRows, Frames, MaskCopies, PairRows
from llm_jax.data.rows.source import Row, Rows, RowSource
from llm_jax.data.rows.streams import CharacterRows, Streams
from llm_jax.data.tokenizers import END_OF_TEXT, MASKED_SPECIAL, Tokenizer
from llm_jax.data.tokens import TokenStore
from llm_jax.objectives import spans
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.objective import Objective
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.storage.digests import FileDigest
from llm_jax.training import baselines, checks
from llm_jax.training.labeled_examples import LabeledExamples

if TYPE_CHECKING:
    from llm_jax.training.run_config import RunConfig

log = logging.getLogger(__name__)
SENTINELS = 100  # entries that a tokenizer trained for span corruption keeps free, as T5's

Cut = Callable[[Any, "RunConfig", Tokenizer, TokenStore, bool], RowSource]


def next_token_rows(
    objective: CausalLM, config: "RunConfig", tokenizer: Tokenizer, store: TokenStore, held_out: bool
) -> RowSource:
    """Rows of T + 1 tokens: cut anywhere, or whole documents side by side."""
    del objective, tokenizer, held_out
    length = config.training.sequence_length
    if config.data.packing == "whole":
        return packing.WholeRows(store, length)
    return packing.StreamRows(store, length, config.data.segments)


def masked_rows(
    objective: MaskedLM, config: "RunConfig", tokenizer: Tokenizer, store: TokenStore, held_out: bool
) -> RowSource:
    """Full sentences or pairs between special tokens; held-out rows have one mask for good."""
    del objective
    data, length, frames = config.data, config.training.sequence_length, Frames.of(tokenizer)
    rows: RowSource
    if data.pairs == "none":
        rows = FramedRows(store, length, frames)
    else:
        rows = PairRows(store, length, frames, data.pairs, config.training.seed)
    copies = 1 if held_out else data.mask_copies
    return MaskCopies(rows, copies) if copies else rows


def seq2seq_rows(
    objective: Seq2Seq, config: "RunConfig", tokenizer: Tokenizer, store: TokenStore, held_out: bool
) -> RowSource:
    """Pairs, or rows of text that the objective makes into pairs."""
    del tokenizer, held_out
    length = config.training.sequence_length
    if objective.task == "pairs":
        return pairs.PairedRows(store, length)
    if objective.task == "spans":  # as much text as gives a source of that length
        ends = objective.end_id is not None
        length = spans.fitting(length, objective.noise_density, objective.mean_span, ends)
    return packing.PlainRows(store, length)


def spelled_rows(
    objective: BidirectionalLM, config: "RunConfig", tokenizer: Tokenizer, store: TokenStore, held_out: bool
) -> RowSource:
    """Rows of T + 1 words with their characters."""
    words = packing.StreamRows(store, config.training.sequence_length)
    rows = CharacterRows(words, tokenizer, config.model.max_characters)
    return Streams(rows, config.training.batch_size) if objective.carry and not held_out else rows


def permuted_rows(
    objective: PermutationLM, config: "RunConfig", tokenizer: Tokenizer, store: TokenStore, held_out: bool
) -> RowSource:
    """Rows of T tokens; nothing is shifted."""
    del tokenizer
    rows = packing.PlainRows(store, config.training.sequence_length)
    if objective.both_ways or (objective.carry and not held_out):
        return Streams(rows, config.training.batch_size, objective.both_ways)
    return rows


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text: tokenized once, stored, cut into rows.

    Attributes:
      cut: `(objective, config, tokenizer, tokens, whether they are held out) -> rows`.
      baseline: `(config, tokens of both parts, training rows, held-out rows) -> loss`, see `Rows.baseline`.
      framed: a document stands in the rows with what the tokenizer's rule puts around a text.
      keeps_tokens: ids are stored in the run's cache.
    """

    cut: Cut
    baseline: baselines.Baseline = baselines.unigram
    framed: bool = False
    keeps_tokens: ClassVar[bool] = True

    def texts(self, config: "RunConfig") -> Iterator[str]:
        """Texts of the training part, which a tokenizer learns from."""
        data = config.data
        documents = corpora.documents(data.source, **data.read_as)
        if data.fields:
            train = (d for d in documents if corpora.split_of(d, data.validation_share) == "train")
            both = (pairs.both(d, data.fields) for d in train)
            return itertools.chain.from_iterable(pair for pair in both if pair is not None)
        documents = (d for d in documents if d.text)
        if data.split == "hash":
            return (d.text for d in documents if corpora.split_of(d, data.validation_share) == "train")
        return (tokens.part_of(d, "train", data.validation_share).text for d in documents)

    def rows(
        self,
        config: "RunConfig",
        tokenizer: Tokenizer,
        workdir: epath.Path,
        encode: tokens.Encode | None,
        kind: str,
        stored: Mapping[str, FileDigest] | None,
    ) -> Rows:
        """Tokenizes the corpus, or opens the cache, and cuts it into rows.

        Args:
          config: the run.
          tokenizer: the run's tokenizer.
          workdir: holds the token cache by default.
          encode: how documents become ids, see `tokens.build`.
          kind: names `encode`.
          stored: digests of source files from an earlier start.
        """
        data = config.data
        if data.fields:
            encode, kind = pairs.encode_pairs(tokenizer, data.fields), f"pairs {data.fields}"
            end = () if tokenizer.separator is None else (tokenizer.separator,)
            kind += f" {tokenizer.rule}" if tokenizer.rule not in (((), ()), ((), end)) else ""  # older caches lack it
        elif encode is not None:
            kind += f" {tokenizer.special_tokens} {tokenizer.tool_template}"  # what chats are written with, too
        stores = tokens.build(
            data.source,
            tokenizer,
            data.cache or workdir / "tokens",
            data.validation_share,
            encode,
            kind,
            split=data.split,
            **data.read_as,
            stored=stored,
            verify=data.verify,
            framed=self.framed,
        )
        for store in stores.values():
            tokens.check_store(tokenizer, config.model.vocab_size, store)
        train = self.cut(config.objective, config, tokenizer, stores["train"], False)
        text = stores["validation"]
        try:
            held_out = self.cut(config.objective, config, tokenizer, text, True)
        except corpora.CorpusError as e:
            if data.validation_share:
                log.warning("nothing is evaluated, the held-out part is too small (data.validation_share): %s", e)
            return Rows(train, None)
        tokens_per_byte = len(text.ids) / text.text_bytes if text.text_bytes and text.weights is None else 0.0
        return Rows(train, held_out, tokens_per_byte, self.baseline(config, stores, train, held_out))

    def example(self, config: "RunConfig", tokenizer: Tokenizer) -> Row:
        """A training row of no text, for what is compiled without data."""
        documents, half = 2 * config.training.batch_size, config.training.sequence_length
        ids = np.zeros(documents * 2 * half, np.uint16)
        targets = np.tile(np.repeat(np.arange(2, dtype=np.uint8), half), documents)
        starts = np.arange(documents + 1) * 2 * half
        store = TokenStore(ids, starts, targets if config.data.fields else None, 0)
        return self.cut(config.objective, config, tokenizer, store, False)[0]


def no_sentinels(objective: Objective) -> int:
    """Reserves no special tokens."""
    del objective
    return 0


def span_sentinels(objective: Seq2Seq) -> int:
    """An entry for every span that may be taken out of a text."""
    return SENTINELS if objective.task == "spans" else 0


class Recipe(NamedTuple):
    """What a run with an objective reads.

    Attributes:
      check: `(objective, config)`; raises ConfigError where data, model and objective do not fit together.
      source: where its rows come from.
      special_tokens: first entries of a tokenizer that is trained for it.
      sentinels: last entries of such a tokenizer that are kept free, by the objective's settings.
    """

    check: Callable[[Any, "RunConfig"], None]
    source: Corpus | LabeledExamples
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    sentinels: Callable[[Any], int] = no_sentinels


RECIPES: dict[type[Any], Recipe] = {
    CausalLM: Recipe(checks.causal, Corpus(next_token_rows, framed=True)),
    MaskedLM: Recipe(checks.masked, Corpus(masked_rows, baselines.masked), MASKED_SPECIAL),
    Seq2Seq: Recipe(checks.seq2seq, Corpus(seq2seq_rows, baselines.targets), sentinels=span_sentinels),
    BidirectionalLM: Recipe(checks.stream, Corpus(spelled_rows)),
    PermutationLM: Recipe(checks.stream, Corpus(permuted_rows)),
    Labels: Recipe(checks.labels, LabeledExamples(), MASKED_SPECIAL),
}


def recipe_of(objective: Objective) -> Recipe:
    """The objective's row of the table."""
    return RECIPES[type(objective)]


def to_dict(objective: Objective) -> dict[str, Any]:
    """JSON-ready, with the tag as `name`."""
    return {"name": objective.tag, **configs.to_dict(objective)}


def tag_of(values: Mapping[str, Any]) -> str:
    """The name of a stored objective; earlier versions wrote none, so it is the one that has most of the fields."""
    if "name" in values:
        return values["name"]
    fields = {objective.tag: {f.name for f in dataclasses.fields(objective)} for objective in RECIPES}
    return max(fields, key=lambda tag: len(fields[tag] & values.keys()))


def from_dict(values: Mapping[str, Any]) -> Objective:
    """Undoes `to_dict`, also of earlier versions.

    Raises:
      ConfigError: on an unknown name or field.
    """
    by_tag = {objective.tag: objective for objective in RECIPES}
    name = tag_of(values)
    if name not in by_tag:
        raise configs.ConfigError(f"objective.name={name!r} is not one of {', '.join(by_tag)}")
    return configs.from_dict(by_tag[name], {k: v for k, v in values.items() if k != "name"}, "objective")
