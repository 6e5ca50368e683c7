"""Tokenized corpora on disk: written once, memory-mapped, checked when opened, rebuilt when damaged.

Opening compares sizes and times of the sources and of the cache with those of the last full check, which are stored
beside their digests (`storage.digests`); only what differs is read and hashed again.
"""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.data.corpora import BadRows, CorpusError, Document, documents, file_digests, fingerprint, split_of
from llm_jax.data.tokenizers import Tokenizer, TokenizerError, check_ids
from llm_jax.storage import digests, locks
from llm_jax.storage.digests import FileDigest

log = logging.getLogger(__name__)
FORMAT = 4
CHECKED = "checked.json"  # digests of the sources and of the cache, at the last full check


class EncodedDocument(NamedTuple):
    """One encoded document: ids and, where only parts are trained, the weight (0 or 1) of predicting each token."""

    ids: list[int]
    weights: list[int] | None = None


Encode = Callable[[Sequence[Document], BadRows], Iterable[EncodedDocument]]


class TokenStore(NamedTuple):
    """A tokenized split.

    Attributes:
      ids: all tokens, one document after the other (memory-mapped).
      starts: `[documents + 1]` offsets.
      weights: uint8 beside `ids`, None where every token is trained.
      text_bytes: UTF-8 bytes of the source text, for bits per byte.
    """

    ids: np.ndarray
    starts: np.ndarray
    weights: np.ndarray | None
    text_bytes: int


def plain_text(tokenizer: Tokenizer, framed: bool = True, text_field: str = "text") -> Encode:
    """Encodes documents as text followed by the separator.

    Args:
      tokenizer: its ids are stored.
      framed: what the tokenizer's rule puts around a text stands there, so that a language model learns texts as it
        will meet them. False for models whose rows are framed later (masked models, ELMo, XLNet, spans).
      text_field: named where a record has no text there.
    """
    end = [] if tokenizer.separator is None else [tokenizer.separator]
    if framed and list(tokenizer.rule.end[-1:]) == end:
        end = []  # it stands there already
    ids_of = tokenizer.encode_texts if framed else tokenizer.encode_batch

    def encode(batch: Sequence[Document], bad: BadRows) -> Iterator[EncodedDocument]:
        usable = []
        for d in batch:
            if d.text:
                usable.append(d.text)
            else:
                others = ", ".join(map(str, d.record or ())) or "no field"
                bad.add(d.name, f"no text in field {text_field!r} (data.text_field), only {others}")
        for ids in ids_of(usable):
            yield EncodedDocument(ids + end)

    return encode


def unigram_loss(train: TokenStore, held_out: TokenStore, vocab_size: int) -> float:
    """Nats a held-out token when every token is guessed by its frequency in the training part, one added to each."""
    size = 2**24  # tokens counted at once: counting makes them 8 bytes wide

    def count(ids: np.ndarray) -> np.ndarray:
        parts = (np.bincount(ids[i : i + size], minlength=vocab_size) for i in range(0, len(ids), size))
        return sum(parts, np.zeros(vocab_size, np.int64))

    return unigram_nats(count(train.ids), count(held_out.ids))


def unigram_nats(seen_V: np.ndarray, asked_V: np.ndarray) -> float:
    """Nats an entry when entries counted in `asked_V` are guessed by their counts in `seen_V`, one added to each."""
    seen = seen_V + 1.0
    return float(np.sum(asked_V * (np.log(seen.sum()) - np.log(seen))) / max(asked_V.sum(), 1))


def build(
    source: str,
    tokenizer: Tokenizer,
    cache: epath.PathLike,
    validation_share: float = 0.0,
    encode: Encode | None = None,
    kind: str = "text",
    text_field: str = "text",
    split: str = "hash",
    group: str | None = None,
    layout: str | None = None,
    encoding: str | None = None,
    stored: Mapping[str, FileDigest] | None = None,
    verify: bool = False,
    framed: bool = True,
) -> dict[str, TokenStore]:
    """Tokenizes a source, or opens the cache of an earlier run.

    The cache is keyed by the tokenizer, the contents of the source and the split; a damaged one is rebuilt.

    Args:
      source: see `corpora.find_files`.
      tokenizer: its ids are stored.
      cache: local folder that holds caches.
      validation_share: share of documents held out, by hash of their content.
      encode: how documents become ids; plain text with a separator by default.
      kind: names `encode` in the key.
      text_field: field of records (JSON, tables, Parquet) that holds the text.
      split: `hash` holds out whole documents by a hash of their content, `tail` the end of every document (for a corpus
        that is one document).
      group: field whose equal values are held out together, see `corpora.documents`.
      layout: see `corpora.documents`.
      encoding: see `corpora.documents`.
      stored: digests of source files from an earlier start.
      verify: reads and hashes the sources and the cache, even where sizes and times say that nothing changed.
      framed: of plain text, see `plain_text`.

    Returns:
      `{"train": ..., "validation": ...}`.

    Raises:
      CorpusError: if the source is missing or empty, or changes while it is read.
    """
    if split not in ("hash", "tail"):
        raise CorpusError(f"data.split={split!r} is neither hash nor tail")
    if split == "tail" and encode is not None:
        raise CorpusError("data.split=tail cuts plain text only; chats and instructions need data.split=hash")
    stored = dict(stored or {}) if verify else {**(stored or {}), **_checked(cache)}
    sources = file_digests(source, layout, stored)
    key = hashlib.blake2b(digest_size=16)
    for part in (str(FORMAT), fingerprint(sources), tokenizer.backend.to_str(), repr(tokenizer.eos_ids), kind):
        key.update(part.encode("utf-8", "surrogatepass") + b"\0")
    read = (group or "", layout or "", encoding or "")
    key.update(f"{validation_share}{split}{text_field}{tokenizer.chat_template}{read}".encode())
    if encode is None and framed and any(tokenizer.rule):
        key.update(repr(tokenizer.rule).encode())  # older caches lack what the rule puts around texts
    folder = epath.Path(cache) / key.hexdigest()
    try:
        return _open(folder, sources, verify)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, KeyError, TypeError) as e:
        log.warning("token cache %s is damaged (%s); building it again", folder, e)
    read_as = {"text_field": text_field, "group": group, "layout": layout, "encoding": encoding}
    encode = encode or plain_text(tokenizer, framed, text_field)
    with _alone(folder):
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            return _open(folder, sources, verify)  # another process filled it meanwhile
        working = epath.Path(f"{folder}.{uuid.uuid4().hex}.tmp")
        working.mkdir(parents=True)
        try:
            _write(source, tokenizer, working, validation_share, encode, split, read_as)
            if changed := [path for path, file in sources.items() if file[:4] != digests.stamp(path)]:
                raise CorpusError(f"{changed[0]} changed while it was tokenized: run again when it is complete")
            _put(working, folder, sources, verify)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return _open(folder, sources)


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes from filling the same cache, where the file system has locks; who waits says so."""
    lock, file = None, folder.with_name(f"{folder.name}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # without locks two processes build it, and one of the two is kept
        try:
            lock = locks.hold(file)
        except BlockingIOError:
            log.info("waiting for another process that fills the token cache %s", folder)
            lock = locks.hold(file, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            file.unlink(missing_ok=True)
            lock.close()


def _put(working: epath.Path, folder: epath.Path, sources: Mapping[str, FileDigest], verify: bool) -> None:
    """Gives a finished cache its name, unless a whole one has it already."""
    try:
        working.rename(folder)
    except OSError:  # there is one: a damaged one, or that of another process that was faster
        try:
            _open(folder, sources, verify)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            working.rename(folder)


def _checked(cache: epath.PathLike) -> dict[str, FileDigest]:
    """Digests of files that are as they were when an earlier run read them."""
    found: dict[str, FileDigest] = {}
    for file in epath.Path(cache).glob(f"*/{CHECKED}"):
        with contextlib.suppress(ValueError, OSError):  # damaged, or removed meanwhile: the files are read instead
            found |= {path: digest for path, digest in digests.load(file).items() if digest.is_current(path)}
    return found


def _write(source, tokenizer, folder, validation_share, encode, how, read_as):
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bad = BadRows()
    splits = {s: _Writer(folder, s, dtype) for s in ("train", "validation")}
    stream = documents(source, bad, **read_as)
    while batch := list(itertools.islice(stream, 256)):
        for split, writer in splits.items():
            if how == "hash":
                chosen = [d for d in batch if split_of(d, validation_share) == split]
            else:
                parts = [(d, part_of(d, split, validation_share)) for d in batch]
                chosen = [p for d, p in parts if p.text or (split == "train" and not d.text)]
            writer.text_bytes += sum(len(d.text.encode("utf-8", "surrogatepass")) for d in chosen)
            for document in encode(chosen, bad):
                writer.add(document)
    for writer in splits.values():
        writer.close()
    if not any(len(w.starts) > 1 for w in splits.values()):
        raise CorpusError(f"{source!r} holds no usable document {bad}")
    if bad.count:
        log.warning("%d bad rows skipped in %s", bad.count, source)


def part_of(document: Document, split: str, share: float) -> Document:
    """The beginning (`train`) or the last `share` (`validation`) of a document."""
    cut = round(len(document.text) * (1 - share))
    return dataclasses.replace(document, text=document.text[:cut] if split == "train" else document.text[cut:])


class _Writer:
    """Writes one split to disk as it is read."""

    def __init__(self, folder: epath.Path, split: str, dtype: Any) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.ids, self.weights = (folder / f"{split}.ids").open("wb"), (folder / f"{split}.weights").open("wb")
        self.digests = {s: hashlib.blake2b(digest_size=16) for s in ("ids", "weights", "starts")}
        self.starts, self.text_bytes, self.weighted = array.array("q", [0]), 0, False

    def add(self, document: EncodedDocument) -> None:
        weights = np.ones(len(document.ids), np.uint8) if document.weights is None else document.weights
        self.weighted |= document.weights is not None
        self._write(self.ids, "ids", np.asarray(document.ids, self.dtype))
        self._write(self.weights, "weights", np.asarray(weights, np.uint8))
        self.starts.append(self.starts[-1] + len(document.ids))

    def _write(self, file: Any, suffix: str, array: np.ndarray) -> None:
        data = array.tobytes()
        file.write(data)
        self.digests[suffix].update(data)

    def close(self) -> None:
        self.ids.close()
        self.weights.close()
        with (self.folder / f"{self.split}.starts").open("wb") as f:
            self._write(f, "starts", np.asarray(self.starts, np.int64))
        meta: dict[str, Any] = {
            "dtype": np.dtype(self.dtype).name,
            "tokens": self.starts[-1],
            "documents": len(self.starts) - 1,
            "weighted": self.weighted,
            "text_bytes": self.text_bytes,
            "digests": {s: d.hexdigest() for s, d in self.digests.items()},
        }
        meta["digest"] = _digest(json.dumps(meta).encode())
        (self.folder / f"{self.split}.json").write_text(json.dumps(meta))


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _open(folder: epath.Path, sources: Mapping[str, FileDigest], verify: bool = False) -> dict[str, TokenStore]:
    """Opens the splits; reads and hashes files that were not, or may have changed since, and stores that they were."""
    file = folder / CHECKED
    checked: dict[str, FileDigest] = {}
    with contextlib.suppress(ValueError):  # damaged: everything is checked
        checked = {} if verify else digests.load(file)
    current = dict(sources)
    stores = {split: _open_split(folder, split, checked, current) for split in ("train", "validation")}
    if current != checked:
        try:
            digests.save(file, current)
        except OSError as e:
            log.info("%s cannot be written (%s): the next start checks everything again", file, e)
    return stores


def _open_split(
    folder: epath.Path, split: str, checked: Mapping[str, FileDigest], current: dict[str, FileDigest]
) -> TokenStore:
    """Opens a split, and puts its files into `current`."""
    meta = json.loads((folder / f"{split}.json").read_text())
    if meta.pop("digest") != _digest(json.dumps(meta).encode()):
        raise ValueError(f"{split}.json does not match its checksum")
    tokens, dtype = meta["tokens"], np.dtype(meta["dtype"])
    sizes = {"ids": tokens * dtype.itemsize, "weights": tokens, "starts": 8 * (meta["documents"] + 1)}
    for suffix, size in sizes.items():
        found = (folder / f"{split}.{suffix}").stat().length
        if found != size:
            raise ValueError(f"{split}.{suffix} has {found} bytes, expected {size}")
    for suffix in sizes:
        path, digest = folder / f"{split}.{suffix}", meta["digests"][suffix]
        entry = checked.get(str(path))
        if entry is None or entry.digest != digest or not entry.is_current(path):
            entry = digests.digest_file(path, digest_size=16)
            if entry.digest != digest:
                raise ValueError(f"{split}.{suffix} does not match its checksum")
        current[str(path)] = entry
    ids = _map(folder / f"{split}.ids", dtype, tokens)
    weights = _map(folder / f"{split}.weights", np.dtype(np.uint8), tokens)
    starts = np.array(_map(folder / f"{split}.starts", np.dtype(np.int64), meta["documents"] + 1))
    return TokenStore(ids, starts, weights if meta["weighted"] else None, meta["text_bytes"])


def _map(file: epath.Path, dtype: np.dtype, count: int) -> np.ndarray:
    """`[count]` numbers of a file, read when they are used; an empty file cannot be mapped."""
    return np.memmap(file, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def check_store(tokenizer: Tokenizer, vocab_size: int, store: TokenStore) -> None:
    """Refuses stored ids that the model's table has no row for.

    It reads them only where the tokenizer has more entries than the table.

    Raises:
      TokenizerError: that names the id and its entry.
    """
    if tokenizer.vocab_size > vocab_size:
        for start in range(0, len(store.ids), 2**24):
            check_ids(store.ids[start : start + 2**24], vocab_size, tokenizer)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids the model has no row for.

    Raises:
      TokenizerError: with both sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {vocab_size}: "
            f"set --config.model.vocab_size={tokenizer.vocab_size} or train a smaller tokenizer"
        )
