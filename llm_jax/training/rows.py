"""What a run reads: its tokenizer and its rows, for every objective."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llm_jax import config as configs
from llm_jax.data import corpora, labeled, tokenizers, tokens
from llm_jax.data.loader import abstract_batch, eval_batches
from llm_jax.data.rows import packing, pairs
from llm_jax.data.rows.labeled_rows import Encoder, LabeledRows, without_text
from llm_jax.data.rows.masked import FramedRows, Frames, MaskCopies, PairRows
from llm_jax.data.rows.streams import CharacterRows, Streams
from llm_jax.objectives import spans
from llm_jax.objectives.bidirectional_lm import BidirectionalLM
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.storage.digests import FileDigest, digest_files
from llm_jax.training.run_config import DataConfig
from llm_jax.training.workdir import has_checkpoint

log = logging.getLogger(__name__)
SENTINELS = 100  # entries that a tokenizer trained for span corruption keeps free, as T5's
TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model", ".spm")  # of a folder; what its tokenizer may be read from
COUNTED = 64  # batches whose labels say what knowing only their frequencies gives


class Rows(NamedTuple):
    """What a run reads.

    Attributes:
      train: training rows.
      held: held-out rows, or None.
      tokens_per_byte: of the held-out text; 0 where its tokens are not what is predicted.
      unigram: the held-out loss under the training part's frequencies of tokens, or of labels: what knowing no context
        gives; 0 where only some tokens are trained.
    """

    train: Any
    held: Any
    tokens_per_byte: float
    unigram: float


def carries(objective: Any) -> bool:
    """Whether something runs on from batch to batch."""
    return getattr(objective, "carry", False)


def read_labeled(data: DataConfig, objective: Labels) -> tuple[list[labeled.Example], list[labeled.Example]]:
    """(training, held-out) examples of a run."""
    split: dict[str, Any] = {"validation": data.validation, "share": data.validation_share}
    read_as = {name: value for name, value in data.read_as.items() if name != "text_field"}
    return labeled.read(data.source, objective.kind, data.fields, **split, **read_as)


def data_digests(data: DataConfig, stored: Mapping[str, FileDigest] | None = None) -> dict[str, FileDigest]:
    """Digests by path of the files that a run reads: sources, held-out ones, the tokenizer.

    Args:
      data: of the run.
      stored: of an earlier start; files that did not change since are not read, unless `data.verify` is set.
    """
    known = None if data.verify else stored
    found: dict[str, FileDigest] = {}
    for source in (data.source, data.validation):
        if source is not None:
            found |= corpora.file_digests(source, data.layout, known)
    if data.tokenizer is not None:
        path = epath.Path(data.tokenizer)
        files = [p for p in path.iterdir() if p.name.endswith(TOKENIZER_FILES)] if path.is_dir() else [path]
        found |= digest_files([p for p in files if p.is_file()], known)
    return found


def _texts(config: Any) -> Iterator[str]:
    """What a tokenizer learns from: the training part."""
    data = config.data
    if isinstance(config.objective, Labels):
        examples, _ = read_labeled(data, config.objective)
        join = config.objective.kind == "tokens"
        return (text for e in examples for text in ([" ".join(e.inputs)] if join else e.inputs))
    read = corpora.documents(data.source, **data.read_as)
    if data.fields:
        train = (d for d in read if corpora.split_of(d, data.validation_share) == "train")
        found = (pairs.both(d, data.fields) for d in train)
        return itertools.chain.from_iterable(pair for pair in found if pair is not None)
    documents = (d for d in read if d.text)
    if data.split == "hash":
        return (d.text for d in documents if corpora.split_of(d, data.validation_share) == "train")
    return (tokens.part_of(d, "train", data.validation_share).text for d in documents)


def _special(objective: Any) -> tuple[str, ...]:
    """Special tokens of a tokenizer that is trained for an objective."""
    return tokenizers.MASKED_SPECIAL if isinstance(objective, (MaskedLM, Labels)) else (tokenizers.END_OF_TEXT,)


def get_tokenizer(config: Any, workdir: epath.Path) -> tokenizers.Tokenizer:
    """The run's tokenizer: named, left by an earlier start, or trained on the training split."""
    size, objective = config.model.vocab_size, config.objective
    if config.data.tokenizer is not None:
        tokenizer = tokenizers.load(config.data.tokenizer)
    elif tokenizers.exists(workdir) and has_checkpoint(workdir):
        tokenizer = tokenizers.load(workdir)
    else:
        kind = config.data.tokenizer_kind
        log.info("training a %s tokenizer of %d entries", kind, size)
        free = SENTINELS if isinstance(objective, Seq2Seq) and objective.task == "spans" else 0
        tokenizer = tokenizers.train(_texts(config), kind, size - free, _special(objective))
        if free:  # entry V - 1 - i is sentinel i
            missing = size - free - tokenizer.vocab_size
            names = [f"<unused_{i}>" for i in range(missing)]
            names += [f"<extra_id_{i}>" for i in reversed(range(free))]
            backend: Any = tokenizer.backend
            backend.add_special_tokens(names)
    tokens.check_vocabulary(tokenizer, size)
    return tokenizer


def check_objective(config: Any) -> None:
    """Says what does not fit together before anything is tokenized.

    Raises:
      ConfigError: naming the fields.
    """
    data, model, objective = config.data, config.model, config.objective
    objective.for_run(1, model, 0)
    if isinstance(objective, Labels):
        labeled.check_fields(objective.kind, data.fields)
        plain = DataConfig()
        for name in ("packing", "segments", "pairs", "mask_copies", "split"):
            if getattr(data, name) != getattr(plain, name):
                raise configs.ConfigError(f"labelled examples are rows of their own: leave data.{name}")
        return
    if data.validation is not None:
        raise configs.ConfigError("data.validation is of labelled examples: take objective Labels")
    paired = isinstance(objective, Seq2Seq) and objective.task == "pairs"
    if len(data.fields) not in (0, 2):
        raise configs.ConfigError(f"data.fields={data.fields} must name a source and a target")
    if bool(data.fields) != paired:
        raise configs.ConfigError("data.fields and objective Seq2Seq(task='pairs') need each other")
    if isinstance(objective, Seq2Seq) and (data.packing != "stream" or data.segments):
        raise configs.ConfigError("encoder-decoders read pairs or full rows: leave data.packing and data.segments")
    streams = isinstance(objective, (BidirectionalLM, PermutationLM))
    if streams and (data.packing != "stream" or data.segments):
        raise configs.ConfigError("ELMo and XLNet read a stream of text: leave data.packing and data.segments")
    if paired and data.split != "hash":
        raise configs.ConfigError("pairs are held out whole: take data.split=hash")
    if not isinstance(objective, MaskedLM):
        if data.pairs != "none" or data.mask_copies:
            raise configs.ConfigError("data.pairs and data.mask_copies are of masked models: take objective MaskedLM")
        return
    if data.packing != "stream" or data.segments:
        raise configs.ConfigError("masked models read full sentences or pairs: leave data.packing and data.segments")
    if data.pairs == "none":
        return
    if model.num_token_types < 2 or (objective.pair and model.head != "pretraining"):
        raise configs.ConfigError(f"data.pairs={data.pairs} needs model.num_token_types=2 and model.head='pretraining'")


def check_cache(data: DataConfig, workdir: epath.PathLike) -> None:
    """Says where tokens cannot lie, before anything is tokenized and in every process of a job.

    Raises:
      ConfigError: naming the folder.
    """
    cache = str(data.cache or workdir)
    if "://" in cache:
        raise configs.ConfigError(
            f"tokens are memory-mapped and cannot lie in {cache}: set --config.data.cache=FOLDER, local to every host"
        )


def _masked(config: Any, tokenizer: tokenizers.Tokenizer, store: tokens.TokenStore, copies: int) -> Any:
    length, kind = config.training.sequence_length, config.data.pairs
    frames = Frames.of(tokenizer)
    seed = config.training.seed
    rows = FramedRows(store, length, frames) if kind == "none" else PairRows(store, length, frames, kind, seed)
    return MaskCopies(rows, copies) if copies else rows


def example(config: Any) -> dict[str, np.ndarray]:
    """One training row as the loader hands it on, of no text: for what is compiled without data.

    Raises:
      ConfigError: for labelled examples, whose rows depend on their labels.
    """
    if isinstance(config.objective, Labels):
        raise configs.ConfigError("rows of labelled examples come from their data: take another objective")
    check_objective(config)
    tokenizer = tokenizers.train(["a b"], "word", 16, _special(config.objective))
    documents = 2 * config.training.batch_size
    size = 2 * config.training.sequence_length
    ids = np.zeros(documents * size, np.uint16)
    halves = np.tile(np.repeat(np.arange(2, dtype=np.uint8), config.training.sequence_length), documents)
    starts = np.arange(documents + 1) * size
    weights = halves if config.data.fields else None
    return dict(_maker(config, tokenizer)(tokens.TokenStore(ids, starts, weights, 0), False)[0])


def example_batch(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of such rows without its values."""
    return abstract_batch(example(config), config.training.batch_size)


def _maker(config: Any, tokenizer: tokenizers.Tokenizer) -> Any:
    """`(store, whether held out) -> rows` of the objective."""
    data, objective, length = config.data, config.objective, config.training.sequence_length
    if isinstance(objective, MaskedLM):
        return lambda store, held: _masked(config, tokenizer, store, 1 if held else data.mask_copies)
    if isinstance(objective, Seq2Seq) and objective.task == "pairs":
        return lambda store, _: pairs.PairedRows(store, length)
    if isinstance(objective, Seq2Seq):
        size = length
        if objective.task == "spans":  # as much text as gives a source of that length
            ends = objective.end_id is not None
            size = spans.fitting(length, objective.noise_density, objective.mean_span, ends)
        return lambda store, _: packing.PlainRows(store, size)
    if data.packing == "whole":
        return lambda store, _: packing.WholeRows(store, length)

    def stream(store: tokens.TokenStore, held: bool) -> Any:
        if isinstance(objective, PermutationLM):  # nothing is shifted
            rows: Any = packing.PlainRows(store, length)
        else:
            rows = packing.StreamRows(store, length, data.segments)
        if isinstance(objective, BidirectionalLM):
            rows = CharacterRows(rows, tokenizer, config.model.max_characters)
        both_ways = getattr(objective, "both_ways", False)
        if both_ways or (carries(objective) and not held):
            return Streams(rows, config.training.batch_size, both_ways)
        return rows

    return stream


def rows_of_model(config: Any, tokenizer: tokenizers.Tokenizer, length: int) -> Any:
    """The objective that a model is made for, and `store -> rows` of a text for it; not for encoder-decoders.

    Args:
      config: the model's.
      tokenizer: its tokenizer.
      length: tokens a row.

    Raises:
      ValueError: if the model's head predicts no tokens.
    """
    made: dict[str, tuple[Any, Callable[[tokens.TokenStore], Any]]] = {
        "causal": (CausalLM(), lambda store: packing.StreamRows(store, length)),
        "both_sides": (MaskedLM(pair=0.0), lambda store: FramedRows(store, length, Frames.of(tokenizer))),
        "any_order": (PermutationLM(), lambda store: packing.PlainRows(store, length)),
        "characters": (
            BidirectionalLM(),
            lambda store: CharacterRows(packing.StreamRows(store, length), tokenizer, config.max_characters),
        ),
    }
    objective, rows_of = made[config.reads]
    return objective.for_run(1, config, tokenizer.role("mask")), rows_of


def _labels(config: Any, rows: Any) -> np.ndarray:
    """How often each entry is a label in some batches of an encoder-decoder's rows."""
    objective = config.objective.for_run(1, config.model, None)

    @jax.jit
    def labels(batch):
        ids, weights = objective.prepare(batch, jax.random.key(0)).targets
        return ids, weights > 0

    counts = np.zeros(config.model.vocab_size, np.int64)
    for batch in eval_batches(rows, config.training.batch_size, COUNTED):
        ids, real = jax.device_get(labels(batch))
        counts += np.bincount(ids[real], minlength=len(counts))
    return counts


def _labeled_rows(config: Any, tokenizer: tokenizers.Tokenizer) -> Rows:
    data, objective = config.data, config.objective
    train, held = read_labeled(data, objective)
    found = labeled.names_of(train, objective.kind, data.fields)
    labels = found if objective.kind in ("choice", "regression", "span") else config.model.labels
    if missing := [label for label in found if label not in labels]:
        raise configs.ConfigError(
            f"model.labels={labels} lacks {', '.join(missing)}: set --config.model.labels to {found}"
        )
    encoder = Encoder.of(config.model, tokenizer, objective.kind, config.training.sequence_length)
    rows = LabeledRows(train, encoder, labels, "training part")
    if not held:
        log.warning("nothing is evaluated, nothing is held out (data.validation, data.validation_share)")
        return Rows(rows, None, 0.0, 0.0)
    own = LabeledRows(held, encoder, labels, "held-out part")
    loss, share = without_text(rows, own, len(labels))
    if share:
        log.info("%d labels; the most frequent one is right in %.1f %% of the held-out part", len(labels), 100 * share)
    return Rows(rows, own, 0.0, loss)


def get_rows(
    config: Any,
    tokenizer: tokenizers.Tokenizer,
    workdir: epath.Path,
    encode: tokens.Encode | None,
    kind: str,
    stored: Mapping[str, FileDigest] | None = None,
) -> Rows:
    """Tokenizes the corpus, or opens the cache, and cuts it into rows.

    Args:
      config: of the run.
      tokenizer: its tokenizer.
      workdir: its work directory, which holds the cache by default.
      encode: how documents become ids, see `tokens.build`.
      kind: names `encode`.
      stored: digests of source files that are known already.
    """
    data = config.data
    if isinstance(config.objective, Labels):
        return _labeled_rows(config, tokenizer)
    cache = data.cache or workdir / "tokens"
    if data.fields:
        encode, kind = pairs.encode_pairs(tokenizer, data.fields), f"pairs {data.fields}"
        end = () if tokenizer.separator is None else (tokenizer.separator,)
        kind += f" {tokenizer.rule}" if tokenizer.rule not in (((), ()), ((), end)) else ""  # older caches lack it
    elif encode is not None:
        kind += f" {tokenizer.special_tokens} {tokenizer.tool_template}"  # what chats are written with, too
    stores = tokens.build(
        *(data.source, tokenizer, cache, data.validation_share, encode, kind),
        split=data.split,
        **data.read_as,
        stored=stored,
        verify=data.verify,
        framed=isinstance(config.objective, CausalLM),
    )
    held = stores["validation"]
    for store in stores.values():
        tokens.check_store(tokenizer, config.model.vocab_size, store)
    make = _maker(config, tokenizer)
    train = make(stores["train"], False)
    try:
        own = make(held, True)
    except corpora.CorpusError as e:
        if data.validation_share:
            log.warning("nothing is evaluated, the held-out part is too small (data.validation_share): %s", e)
        return Rows(train, None, 0.0, 0.0)
    if isinstance(config.objective, Seq2Seq):
        seen, asked = _labels(config, train), _labels(config, own)
        return Rows(train, own, 0.0, tokens.unigram_nats(seen, asked))
    ratio = len(held.ids) / held.text_bytes if held.text_bytes and held.weights is None else 0.0
    unigram = tokens.unigram_loss(stores["train"], held, config.model.vocab_size) if ratio else 0.0
    return Rows(train, own, ratio, unigram)
