"""Tokenizers: load, train, save, and watch BPE learn. The work is done by the `tokenizers` library, or `sentencepiece`.

Sources: Sennrich et al. 2016 (BPE), https://arxiv.org/abs/1508.07909; Schuster and Nakajima 2012 (WordPiece); Kudo
2018 (Unigram), https://arxiv.org/abs/1804.10959.
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.data import sentencepiece
from llm_jax.data.sentencepiece import FILE, MARIAN, SentencePiece, TokenizerError, read_json

# how BERT's, XLNet's and RoBERTa's vocabularies spell them
ROLES = {
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}
MASKED_SPECIAL = ("[SEP]", "[PAD]", "[CLS]", "[MASK]")  # of the vocabularies trained here for masked models
KINDS = ("bpe", "wordpiece", "unigram", "char", "word")
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A `tokenizers.Tokenizer`, or SentencePiece models, with the special ids that models need.

    Attributes:
      backend: the library's tokenizer.
      bos_id: put in front of a text, or None.
      eos_ids: ids that end a text; the first separates packed documents.
      chat_template: jinja2 source, or None.
      token_types: whether `batch` says which text of a pair a token belongs to.
      target: what encodes the targets of an encoder-decoder: itself, but for Marian.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | SentencePiece,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """Wraps a backend."""
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.token_types = True
        self.target = self

    @property
    def vocab_size(self) -> int:
        """Entries, added tokens included."""
        return max(self.backend.get_vocab_size(), 1 + max(self.backend.get_vocab().values(), default=-1))

    @property
    def separator(self) -> int | None:
        """What ends a document in a token store: the first end-of-text token, or BERT's `[SEP]`."""
        return self.role("sep") if self.eos_id is None else self.eos_id

    @property
    def eos_id(self) -> int | None:
        """The separator of packed documents."""
        return self.eos_ids[0] if self.eos_ids else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_source(self, text: str) -> list[int]:
        """Ids of a text as an encoder-decoder reads it, with its end."""
        ids = self.backend.encode(text).ids
        end = self.separator
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in parallel."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs of an encoder: texts, or pairs of them, between special tokens, padded to the longest row.

        Args:
          texts: first (or only) texts.
          pairs: second texts, as many.
          length: tokens a row at most; whichever of the two texts is longer loses its end first.

        Returns:
          `input_ids` and `attention_mask` `[B, T]` int32, and `token_type_ids` where second texts have their own.

        Raises:
          TokenizerError: if there are no texts, or not as many of both.
        """
        rows = self.encodings(texts, pairs, length)
        pad, size = self.role("pad") or 0, max(len(row.ids) for row in rows)
        fill = lambda values, rest: np.array([[*v, *[rest] * (size - len(v))] for v in values], np.int32)
        out = {
            "input_ids": fill([r.ids for r in rows], pad),
            "attention_mask": fill([[1] * len(r.ids) for r in rows], 0),
        }
        types = fill([r.type_ids for r in rows], 0)
        return {**out, "token_type_ids": types} if types.any() and self.token_types else out

    def encodings(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        length: int | None = None,
        strategy: str = "longest_first",
    ) -> list[Any]:
        """The library's rows of the same: ids between special tokens, and where in the texts each comes from.

        Args:
          texts: first (or only) texts.
          pairs: second texts, as many.
          length: tokens a row at most.
          strategy: which text loses its end: `longest_first` or `only_second`.

        Raises:
          TokenizerError: if there are no texts, or not as many of both.
        """
        if not texts or (pairs is not None and len(pairs) != len(texts)):
            raise TokenizerError(f"{len(texts)} texts and {len(pairs or ())} second ones make no batch")
        if length is not None:
            self.backend.enable_truncation(length, strategy=strategy)
        try:
            return self.backend.encode_batch(list(texts if pairs is None else zip(texts, pairs, strict=True)))
        finally:
            self.backend.no_truncation()

    def words(self, text: str) -> list[str]:
        """The text as the tokenizer first cuts it, before it looks anything up."""
        before = getattr(self.backend, "pre_tokenizer", None)  # SentencePiece's cut nowhere
        return text.split() if before is None else [word for word, _ in before.pre_tokenize_str(text)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, index: int) -> str:
        """The vocabulary entry of an id."""
        entry = self.backend.id_to_token(index)
        return f"<{index}>" if entry is None else entry

    def role(self, name: str) -> int | None:
        """Id of the token that plays a part: `cls`, `sep`, `mask`, `pad` or `unk`; None where there is none."""
        ids = (self.backend.token_to_id(spelling) for spelling in ROLES[name])
        return next((i for i in ids if i is not None), None)

    def is_special(self) -> np.ndarray:
        """`[V]` bool: entries that stand for no text."""
        out = np.zeros(self.vocab_size, bool)
        out[[i for i, token in self.backend.get_added_tokens_decoder().items() if token.special]] = True
        return out

    def starts_word(self) -> np.ndarray:
        """`[V]` bool: entries that begin a word, by the mark of their kind (`##`, a blank before); special ones do."""
        entries = self.backend.get_vocab()
        kind = json.loads(self.backend.to_str())["model"]["type"]
        out = np.ones(self.vocab_size, bool)
        if kind == "WordPiece":
            begins = lambda entry: not entry.startswith("##")
        elif any(e.startswith("\u2581") for e in entries):  # a blank as Metaspace writes it
            begins = lambda entry: entry.startswith("\u2581")
        elif kind == "BPE":  # blank, line end and tab as byte-level BPE writes them
            begins = lambda entry: entry.startswith(("\u0120", "\u010a", "\u0109"))
        else:
            return out
        special = self.is_special()
        for entry, index in entries.items():
            out[index] = special[index] or begins(entry)
        return out

    def special(self, index: int | None) -> str:
        """The vocabulary entry of a special id, the empty string for None."""
        return "" if index is None else self.token(index)

    def save(self, folder: epath.PathLike) -> None:
        """Writes `tokenizer.json` or SentencePiece's files, and what we need beside it."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if isinstance(self.backend, SentencePiece):
            extra = dict(self.backend.settings)
            self.backend.save(folder)
        else:
            (folder / FILE).write_text(self.backend.to_str())
            (folder / MARIAN[0]).unlink(missing_ok=True)  # an older one would be read in its place
        if self.bos_id is not None:
            extra["bos_token"] = self.token(self.bos_id)
        if self.eos_ids:
            extra["eos_token"] = self.token(self.eos_ids[0])
            extra["eos_token_ids"] = list(self.eos_ids)
        if self.role("mask") is not None:  # the parts of a masked model's vocabulary
            parts = {name: self.role(name) for name in ROLES}
            extra |= {f"{name}_token": self.token(index) for name, index in parts.items() if index is not None}
            types = ["token_type_ids"] if self.token_types else []  # which transformers 5 leaves out by default
            extra["model_input_names"] = ["input_ids", *types, "attention_mask"]
        if self.chat_template is not None:
            extra["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(extra, indent=2) + "\n")


def exists(folder: epath.PathLike) -> bool:
    """Whether a folder holds a tokenizer that `load` reads."""
    folder = epath.Path(folder)
    return (folder / FILE).exists() or sentencepiece.exists(folder)


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`, or the folder around it or SentencePiece's files with its `tokenizer_config.json`.

    Raises:
      TokenizerError: if there is none, or it cannot be parsed.
    """
    path = epath.Path(path)
    file = path / FILE if path.is_dir() else path
    read = lambda name: read_json(file.parent / name) if (file.parent / name).exists() else {}
    settings, named = read("tokenizer_config.json"), read("generation_config.json").get("eos_token_id")
    backend, target = _backends(file, path.is_dir() and sentencepiece.exists(path), settings)
    if isinstance(backend, SentencePiece):
        settings = backend.settings

    def index(name: str) -> int | None:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return None if value is None else backend.token_to_id(value)

    eos = [index("eos_token"), *settings.get("eos_token_ids", [])]
    eos += named if isinstance(named, list) else [named]
    if all(i is None for i in eos):
        eos = [backend.token_to_id(END_OF_TEXT)]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    beside = file.parent / "chat_template.jinja"
    if template is None and beside.exists():
        template = beside.read_text()
    rest = (index("bos_token"), list(dict.fromkeys(i for i in eos if i is not None)), template)
    tokenizer = Tokenizer(backend, *rest)
    if target is not backend:
        tokenizer.target = Tokenizer(target, *rest)
    return tokenizer


def blanks() -> Tokenizer:
    """Cuts at blanks and knows no word: for models that spell words themselves."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def _backends(file: epath.Path, pieces: bool, settings: dict[str, Any]) -> tuple[Any, Any]:
    """What encodes sources and what encodes targets."""
    if pieces:
        return sentencepiece.read(file.parent, settings)
    if not file.exists():
        raise TokenizerError(f"no tokenizer at {file}")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as e:
        raise TokenizerError(f"{file} is no tokenizer.json: {e}") from e
    backend.no_padding()
    backend.no_truncation()
    return backend, backend


def train(texts: Iterable[str], kind: str, vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Learns a vocabulary.

    Args:
      texts: any iterator of text.
      kind: `bpe` (byte-level), `wordpiece`, `unigram`, `char` (the characters seen; `vocab_size` is not used) or `word`
        (words and punctuation, the most frequent first).
      vocab_size: entries, special tokens included.
      special: the first one separates documents.

    Raises:
      TokenizerError: on an unknown kind or a size below the base vocabulary.
    """
    if kind not in KINDS:
        raise TokenizerError(f"tokenizer kind={kind!r} is none of {', '.join(KINDS)}")
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(special), "show_progress": False}
    if kind == "bpe":
        if vocab_size < 256 + len(special):
            raise TokenizerError(f"vocab_size={vocab_size} is below the 256 bytes and {len(special)} special tokens")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif kind == "wordpiece":
        common["special_tokens"] = [*special, "[UNK]"]
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    elif kind == "unigram":
        common["special_tokens"] = [*special, "<unk>"]
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    elif kind == "word":
        common["special_tokens"] = [*special, "<unk>"]
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    else:
        common |= {"vocab_size": 2**31 - 1, "special_tokens": [*special, "<unk>"]}
        trainer = trainers.WordLevelTrainer(**common)
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    try:
        backend.train_from_iterator(texts, trainer)
    except ValueError:  # a corpus that cannot be read says so itself
        raise
    except Exception as e:
        raise TokenizerError(f"a {kind} tokenizer of vocab_size={vocab_size} cannot be trained: {e}") from e
    if {"[CLS]", "[SEP]"} <= set(special):
        ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    first = backend.token_to_id(special[0]) if special else None
    return Tokenizer(backend, None, [] if first is None else [first])


class Merge(NamedTuple):
    """One step of BPE on the replayed words: the pair, how often it stood there, and the words after it."""

    pair: tuple[str, str]
    occurrences: int
    words: dict[str, tuple[str, ...]]


def replay_merges(tokenizer: Tokenizer, words: Mapping[str, int]) -> list[Merge]:
    """Replays the learned merges, in the order learned, on given words with their counts.

    Shows what the algorithm sees: which pair is merged, how often it occurs in these words, and into which pieces
    each word is cut afterwards. Merges that touch none of the words are left out.

    Raises:
      TokenizerError: if the tokenizer is no BPE.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"merges can be replayed for BPE only, this is {model['type']}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {w: tuple(byte_level.pre_tokenize_str(w)[0][0]) for w in words}
    history = []
    for merge in model["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        counts: collections.Counter[str] = collections.Counter()
        for word, cut in pieces.items():
            joined = _merge(cut, a, b)
            if len(joined) != len(cut):
                counts[word] = words[word] * (len(cut) - len(joined))
                pieces[word] = joined
        if counts:
            history.append(Merge((a, b), counts.total(), dict(pieces)))
    return history


def _merge(cut: tuple[str, ...], a: str, b: str) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(cut):
        if i + 1 < len(cut) and cut[i] == a and cut[i + 1] == b:
            out.append(a + b)
            i += 2
        else:
            out.append(cut[i])
            i += 1
    return tuple(out)
