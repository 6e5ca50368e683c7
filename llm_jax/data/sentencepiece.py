"""The SentencePiece models of Marian, T5, ALBERT and XLNet, with the interface of a `tokenizers.Tokenizer`.

The `sentencepiece` library cuts the texts, so the ids are those that the models were trained on. A Unigram model of
`tokenizers` built from the same pieces differs in two cases: its character map drops a combining mark after a letter
that it replaces, and transformers builds it without the byte pieces of mT5.

Sources: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226; special tokens follow transformers' tokenizers; the
preparation of text for XLNet and ALBERT follows their authors' `prepro_utils.py` and `tokenization.py`.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from etils import epath

BLANK = "\u2581"  # stands for a blank in pieces
FILE = "tokenizer.json"  # the file of the `tokenizers` library
SPIECE = "spiece.model"
MARIAN = ("source.spm", "target.spm", "vocab.json")
ADDED = "added_tokens.json"


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or does not fit."""


class Family(NamedTuple):
    """Special tokens and text preparation of a model family.

    Attributes:
      name: transformers' tokenizer class.
      end: entry after each text, such as `</s>`.
      front: entry before the first text.
      last: entry after all texts, with a token type of its own.
      eos: the end-of-sequence token if the settings name none.
      special: entries that stand for no text, in addition to the model's control symbols.
      typed: whether the second text has token type 1.
      prepared: whether accents, doubled blanks and the commas in numbers are removed from texts.
      lower: whether texts are lower-cased if the settings do not say.
      extra: number of sentinels after the model's pieces if the settings do not say.
    """

    name: str
    end: str
    front: str | None = None
    last: str | None = None
    eos: str = "</s>"
    special: tuple[str, ...] = ("<unk>", "</s>", "<pad>")
    typed: bool = False
    prepared: bool = False
    lower: bool = False
    extra: int = 0


FAMILIES = {
    "marian": Family("MarianTokenizer", "</s>"),
    "t5": Family("T5Tokenizer", "</s>", extra=100),
    "albert": Family(
        *("AlbertTokenizer", "[SEP]", "[CLS]", None, "[SEP]", ("<unk>", "<pad>", "[CLS]", "[SEP]", "[MASK]")),
        *(True, True, True),
    ),
    "xlnet": Family(
        *("XLNetTokenizer", "<sep>", None, "<cls>", "</s>"),
        ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"),
        *(True, True),
    ),
}
KINDS = {family.name: kind for kind, family in FAMILIES.items()} | {"MT5Tokenizer": "t5", "mt5": "t5"}
KINDS |= {kind: kind for kind in FAMILIES}  # as config.json names models


class Encoding(NamedTuple):
    """Ids and token types of an encoded text or pair of texts."""

    ids: list[int]
    type_ids: list[int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Character spans of the tokens, which SentencePiece does not report.

        Raises:
          TokenizerError: always.
        """
        raise TokenizerError("a SentencePiece model does not report character offsets; chats need a tokenizer.json")


@dataclasses.dataclass
class SentencePiece:
    """The backend of a `Tokenizer` that reads SentencePiece files.

    Attributes:
      family: special tokens and preparation.
      model: the library's processor that cuts texts.
      decoder: the processor that joins pieces; for Marian, that of the target language.
      vocab: entry -> id.
      special: entries that are found in a text before it is cut -> whether they stand for no text.
      settings: fields of `tokenizer_config.json`.
      files: file name -> bytes, which `save` writes.
    """

    family: Family
    model: Any
    decoder: Any
    vocab: dict[str, int]
    special: dict[str, bool]
    settings: dict[str, Any]
    files: dict[str, bytes]

    def __post_init__(self) -> None:
        """Refuses a vocabulary that lacks the family's special tokens."""
        family = self.family
        needed = [entry for entry in (family.front, family.end, family.last, "<unk>") if entry is not None]
        missing = [entry for entry in needed if entry not in self.vocab]
        if missing:
            raise TokenizerError(f"{' and '.join(self.files)} hold no {', '.join(missing)}, which {family.name} needs")
        self.entries = {index: entry for entry, index in self.vocab.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._length: int | None = None

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the special tokens (before, after) a text."""
        family = self.family
        front, behind = [family.front], [family.end, family.last]
        ids = lambda entries: tuple(self.vocab[entry] for entry in entries if entry is not None)
        return ids(front), ids(behind)

    def encode(self, text: str, pair: str | None = None, add_special_tokens: bool = True) -> Encoding:
        """Ids and token types of a text, or of a pair of texts."""
        texts = [self._ids(t) for t in (text, pair) if t is not None]
        if not add_special_tokens:
            return Encoding(sum(texts, []), [i for i, ids in enumerate(texts) for _ in ids])
        family = self.family
        front = [] if family.front is None else [self.vocab[family.front]]
        last = [] if family.last is None else [self.vocab[family.last]]
        if self._length is not None:
            texts = _shortened(texts, self._length - len(front) - len(texts) - len(last))
        ids, types = list(front), [0] * len(front)
        for i, its in enumerate(texts):
            ids += [*its, self.vocab[family.end]]
            types += [i * family.typed] * (len(its) + 1)
        return Encoding(ids + last, types + [2] * len(last))

    def encode_batch(self, texts: Sequence[Any], add_special_tokens: bool = True) -> list[Encoding]:
        """`encode` for each text or pair of texts."""
        each = ((text,) if isinstance(text, str) else text for text in texts)
        return [self.encode(*text, add_special_tokens=add_special_tokens) for text in each]

    encode_batch_fast = encode_batch

    def _ids(self, text: str) -> list[int]:
        unknown = self.vocab["<unk>"]
        return [self.vocab.get(piece, unknown) for piece in self.pieces(text)]

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text; unknown pieces are spelled as in the text."""
        out: list[str] = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:
                out.append(part)
                continue
            if (
                self.family is FAMILIES["marian"] and part.startswith(">>") and "<<" in part
            ):  # the language to translate to
                code, end, part = part.partition("<<")
                out.append(code + end)
            out += self._prepared(part) if self.family.prepared else self.model.encode(part, out_type=str)
        return out

    def _prepared(self, text: str) -> list[str]:
        text = " ".join(text.split()).replace("``", '"').replace("''", '"')
        if not self.settings.get("keep_accents", False):
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        text = text.lower() if self.settings.get("do_lower_case", self.family.lower) else text
        out = []
        for piece in self.model.encode(text, out_type=str):
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():  # cut again, without the comma
                number = self.model.encode(piece[:-1].replace(BLANK, ""), out_type=str)
                if not piece.startswith(BLANK) and number[0].startswith(BLANK):
                    number = [number[0][1:], *number[1:]] if len(number[0]) > 1 else number[1:]
                out += [*number, ","]
            else:
                out.append(piece)
        return out

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids without an entry are left out."""
        text: list[str] = []
        run: list[str] = []

        def flush() -> None:
            if run:  # after other text, the blank before the first piece is kept
                text.append(self.decoder.decode_pieces(["|", *run])[1:] if text else self.decoder.decode_pieces(run))
                run.clear()

        for entry in (self.entries.get(i) for i in ids):
            if entry is None or (skip_special_tokens and self.special.get(entry)):
                continue
            if entry in self.special:
                flush()
                text.append(entry)
            else:
                run.append(entry)
        flush()
        joined = "".join(text)
        if self.family is FAMILIES["marian"]:  # the target's model leaves pieces of the source as they are
            joined = joined.replace(BLANK, " ").strip()
        return joined

    def enable_truncation(self, length: int, strategy: str = "longest_first") -> None:
        """Limits later encodings to `length` tokens; the end of the longer text is cut first."""
        del strategy
        self._length = length

    def no_truncation(self) -> None:
        """Removes the limit of `enable_truncation`."""
        self._length = None

    def id_to_token(self, index: int) -> str | None:
        """The entry of an id, None if there is none."""
        return self.entries.get(index)

    def token_to_id(self, entry: str) -> int | None:
        """The id of an entry, None if there is none."""
        return self.vocab.get(entry)

    def get_vocab(self) -> dict[str, int]:
        """All entries: entry -> id."""
        return dict(self.vocab)

    def get_vocab_size(self) -> int:
        """Number of entries."""
        return len(self.vocab)

    def get_added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """The entries that are found in a text before it is cut, by id."""
        return {self.vocab[e]: tokenizers.AddedToken(e, special=special) for e, special in self.special.items()}

    def to_str(self) -> str:
        """JSON that is equal for equal tokenizers: digests of the files and the settings that matter."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        added = {entry: (self.vocab[entry], special) for entry, special in self.special.items()}
        prepared = {name: self.settings.get(name) for name in ("keep_accents", "do_lower_case")}
        model = {"type": "SentencePiece", "family": self.family.name, **digests}
        return json.dumps({"model": model, "added_tokens": added, **prepared}, sort_keys=True)

    def save(self, folder: epath.Path) -> None:
        """Writes the files that this tokenizer was read from."""
        (folder / FILE).unlink(missing_ok=True)  # an older one would be read instead
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def _shortened(texts: list[list[int]], room: int) -> list[list[int]]:
    """Cuts texts to `room` ids in total: the longer loses its end until both are equally long, then both."""
    if len(texts) == 1:
        return [texts[0][: max(room, 0)]]
    short, long = sorted(map(len, texts))
    long = max(short, min(long, room - short))
    if short + long > room:
        short, long = room // 2, room - room // 2
    first_longer = len(texts[0]) > len(texts[1])
    return [texts[0][: long if first_longer else short], texts[1][: short if first_longer else long]]


def exists(folder: epath.Path) -> bool:
    """Whether a folder holds Marian's models, or a SentencePiece model without a `tokenizer.json`."""
    return (folder / MARIAN[0]).exists() or ((folder / SPIECE).exists() and not (folder / FILE).exists())


def read_json(file: epath.Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
      TokenizerError: if it holds anything else.
    """
    try:
        values = json.loads(file.read_text("utf-8-sig"))
    except ValueError as e:
        raise TokenizerError(f"{file} is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise TokenizerError(f"{file} holds no JSON object")
    return values


def read(folder: epath.Path, settings: Mapping[str, Any]) -> tuple[SentencePiece, SentencePiece]:
    """Reads Marian's `source.spm`, `target.spm`, `vocab.json`, or the `spiece.model` of the others.

    Args:
      folder: holds the files.
      settings: fields of its `tokenizer_config.json`.

    Returns:
      The tokenizer of sources and that of targets; only Marian's differ.

    Raises:
      TokenizerError: if the library or a file is missing, a file is damaged, or no family is named.
    """
    kind = _kind(folder, settings)
    family = FAMILIES[kind]
    settings = {"eos_token": family.eos, **{k: v for k, v in settings.items() if v is not None}}
    settings["tokenizer_class"] = family.name
    for name, value in {"sp_model_kwargs": {}, "separate_vocabs": False, "add_prefix_space": True}.items():
        if settings.get(name, value) != value:
            raise TokenizerError(f"{folder}: {name}={settings[name]!r} is not supported, only {value!r}")
    names = MARIAN if kind == "marian" else (SPIECE,)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise TokenizerError(f"{folder} lacks {', '.join(missing)}")
    files = {name: (folder / name).read_bytes() for name in names}
    if (folder / ADDED).exists():
        files[ADDED] = (folder / ADDED).read_bytes()
    models = [_processor(folder / name, files[name]) for name in names if name.endswith((".spm", ".model"))]
    special = dict.fromkeys(family.special, True)
    if kind == "marian":
        vocab = read_entries(folder / MARIAN[2])
    else:
        pieces = {models[0].id_to_piece(i): i for i in range(models[0].get_piece_size())}
        special |= {piece: True for piece, i in pieces.items() if models[0].is_control(i)}
        count = settings.get("extra_ids", family.extra)
        sentinels = {f"<extra_id_{count - 1 - i}>": len(pieces) + i for i in range(count)}
        special |= dict.fromkeys(sentinels, True)
        vocab = pieces | sentinels
    if ADDED in files:
        added = read_entries(folder / ADDED)
        vocab |= added
        special = dict.fromkeys(added, False) | special
    for index, entry in (settings.get("added_tokens_decoder") or {}).items():
        vocab[entry["content"]] = int(index)
        special[entry["content"]] = entry.get("special", False)
    special = {entry: value for entry, value in special.items() if entry in vocab}
    both = [SentencePiece(family, m, models[-1], vocab, special, settings, files) for m in models]
    return both[0], both[-1]


def _kind(folder: epath.Path, settings: Mapping[str, Any]) -> str:
    if (folder / MARIAN[0]).exists():
        return "marian"
    named = [str(settings.get("tokenizer_class", "")).removesuffix("Fast")]
    config = folder / "config.json"
    named += [str(read_json(config).get("model_type"))] if config.exists() else []
    kind = next((KINDS[name] for name in named if name in KINDS), None)
    if kind is None:
        raise TokenizerError(
            f"{folder / SPIECE} may be of any family: name it in config.json's model_type; there are {', '.join(KINDS)}"
        )
    return kind


def _processor(file: epath.Path, data: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError as e:
        raise TokenizerError(f"{file} needs SentencePiece: pip install 'llm_jax[sentencepiece]'") from e
    try:
        if not data:  # the library accepts it, and fails at every call
            raise ValueError("empty")
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as e:
        raise TokenizerError(f"{file} is not a SentencePiece model") from e


def read_entries(file: epath.Path) -> dict[str, int]:
    """Reads a JSON file that maps entries to ids.

    Raises:
      TokenizerError: if it holds anything else, or an id is not a number.
    """
    values = read_json(file)
    wrong = next((entry for entry, index in values.items() if not isinstance(index, int) or index < 0), None)
    if wrong is not None:
        raise TokenizerError(f"{file}: {wrong!r} has the id {values[wrong]!r}")
    return values
