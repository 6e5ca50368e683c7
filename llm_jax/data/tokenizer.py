"""A tokenizer: texts to ids and back, and the special ids that models need.

The work is done by the `tokenizers` library, or `sentencepiece`.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, processors

from llm_jax.data.sentencepiece import ADDED, FILE, MARIAN, SentencePiece, TokenizerError

# how BERT's, XLNet's and RoBERTa's vocabularies spell them
ROLES = {
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
END_OF_TEXT = "<|endoftext|>"
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # in transformers' order


class Rule(NamedTuple):
    """The ids that a tokenizer's own rule puts around a plain text.

    Attributes:
      begin: in front of the text.
      end: behind it.
    """

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


def rule_of(backend: Any) -> Rule:
    """The rule of a backend: its post-processor's, or that of a SentencePiece model's family."""
    if isinstance(backend, SentencePiece):
        return Rule(*backend.around)
    if backend.post_processor is None:
        return Rule()
    word = tokenizers.Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    framed = backend.post_processor.process(word)
    place = framed.special_tokens_mask.index(0)
    return Rule(tuple(framed.ids[:place]), tuple(framed.ids[place + 1 :]))


def set_rule(backend: tokenizers.Tokenizer, rule: Rule) -> None:
    """Gives a backend a rule instead of its own; `tokenizer.json` holds it. Byte-level offsets stay as they are."""
    spelled = {i: backend.id_to_token(i) or f"id {i}" for i in (*rule.begin, *rule.end)}
    names = {i: f"id {i}" if ":" in token or token.startswith("$") else token for i, token in spelled.items()}
    around = lambda text, kind: [
        *(f"{names[i]}:{kind}" for i in rule.begin),
        f"{text}:{kind}",
        *(f"{names[i]}:{kind}" for i in rule.end),
    ]
    template = processors.TemplateProcessing(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=[{"id": names[i], "ids": [i], "tokens": [token]} for i, token in spelled.items()],
    )
    before = {} if backend.post_processor is None else json.loads(backend.post_processor.__getstate__())
    steps: list[Any] = [
        processors.ByteLevel(**{k: v for k, v in step.items() if k != "type"})
        for step in before.get("processors", [before])
        if step.get("type") == "ByteLevel"
    ]
    backend.post_processor = processors.Sequence([*steps, template]) if steps else template


def check_ids(ids: Any, rows: int, tokenizer: "Tokenizer | None" = None) -> None:
    """Refuses token ids that a model's table has no row for: compiled code would answer with NaN, or a wrong row.

    Args:
      ids: an array, or a list, of any shape.
      rows: entries of the table.
      tokenizer: names the entry.

    Raises:
      TokenizerError: that names the first such id.
    """
    ids = np.asarray(ids)
    if not ids.size or (ids.min() >= 0 and ids.max() < rows):
        return
    wrong = int(ids[(ids < 0) | (ids >= rows)].flat[0])
    entry = "" if tokenizer is None else f" ({tokenizer.token(wrong)!r})"
    raise TokenizerError(
        f"the token id {wrong}{entry} lies outside of the model's table of {rows} entries: take the tokenizer that the "
        "model was made with, or a model with a row for every entry"
    )


@contextlib.contextmanager
def _whole_characters() -> Iterator[None]:
    """Says what the libraries' errors mean that a text with half a surrogate pair gets."""
    try:
        yield
    except (TypeError, UnicodeEncodeError) as e:
        raise TokenizerError(f"the text holds half a surrogate pair, which is not a character ({e})") from e


class Tokenizer:
    """A `tokenizers.Tokenizer`, or SentencePiece models, with the special ids that models need.

    Two questions have two answers. `rule` says what stands around a plain text: the tokenizer's own post-processor, as
    in transformers. It holds wherever a language model meets a text: training rows, prompts, likelihoods. `bos_id` says
    which entry chat templates mean by `bos_token`; templates write it where they want it.

    A tokenizer without a begin token starts a prompt with the prompt itself. A text whose likelihood is asked for then
    follows the separator, as documents do in training rows (`decoding.prefill.beginning`).

    Attributes:
      backend: the library's tokenizer.
      bos_id: the entry named `bos_token`, or None.
      eos_ids: ids that end a text; the first separates packed documents.
      chat_template: jinja2 source, or None.
      tool_template: the one for chats with tools, where that is another.
      named: special tokens by name (`pad_token`), as the tokenizer's files spell them; None where no file says it.
      token_types: whether `batch` says which text of a pair a token belongs to.
      target: what encodes the targets of an encoder-decoder: itself, but for Marian.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | SentencePiece,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        named: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a backend: a `tokenizers.Tokenizer` or a `SentencePiece`."""
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.tool_template: str | None = None
        self.named = None if named is None else dict(named)
        self.token_types = True
        self.target = self

    @property
    def vocab_size(self) -> int:
        """Number of entries, added tokens included."""
        return max(self.backend.get_vocab_size(), 1 + max(self.backend.get_vocab().values(), default=-1))

    @property
    def separator(self) -> int | None:
        """What ends a document in a token store: the first end-of-text token, or BERT's `[SEP]`."""
        return self.role("sep") if self.eos_id is None else self.eos_id

    @property
    def eos_id(self) -> int | None:
        """Id of the token between packed documents."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def rule(self) -> Rule:
        """Special tokens that the tokenizer puts around a text."""
        return rule_of(self.backend)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by name, as chat templates and `tokenizer_config.json` know them."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        if self.named is not None:
            return {name: self.token(index) for name, index in ids.items() if index is not None} | self.named
        return self._parts() | {name: self.token(index) for name, index in ids.items() if index is not None}

    def _parts(self) -> dict[str, str]:
        """What a masked model's vocabulary shows by its spellings."""
        parts = {name: self.role(name) for name in ROLES}
        by_role = {f"{name}_token": self.token(index) for name, index in parts.items() if index is not None}
        return by_role if "mask_token" in by_role else {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none are added."""
        return self.encoding(text).ids

    def encoding(self, text: str) -> Any:
        """The library's encoding of a text, without special tokens: ids, and where in the text each comes from.

        Raises:
          TokenizerError: for half a surrogate pair, which is not a character.
        """
        with _whole_characters():
            return self.backend.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a language model continues: what the rule puts in front, and the text."""
        return [*self.rule.begin, *self.encode(text)]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, with all that the rule puts around them."""
        with _whole_characters():
            return [e.ids for e in self.backend.encode_batch_fast(list(texts))]

    def encode_source(self, text: str) -> list[int]:
        """Ids of a text as an encoder-decoder reads it, with its end."""
        return self.encode_sources([text])[0]

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts as an encoder-decoder reads them, each with its end."""
        end = self.separator
        tail = [] if end is None or self.rule.end[-1:] == (end,) else [end]
        return [[*ids, *tail] for ids in self.encode_texts(texts)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in parallel."""
        with _whole_characters():
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
        """Decodes ids to text."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def settled(self, ids: Sequence[int]) -> int:
        """How many leading ids have a text that no later id changes.

        Where single bytes have entries (`<0xE2>`), a run of them is decoded as a whole: an unfinished run is open.
        """
        end = len(ids)
        while end and (_BYTE.fullmatch(self.token(int(ids[end - 1]))) or not self.decode([ids[end - 1]])):
            end -= 1  # what has no text of its own, as special tokens, interrupts no run
        return end

    def token(self, index: int) -> str:
        """Vocabulary entry of an id."""
        entry = self.backend.id_to_token(index)
        return f"<{index}>" if entry is None else entry

    def role(self, name: str) -> int | None:
        """Id of the token that plays a part: `cls`, `sep`, `mask`, `pad` or `unk`; None where there is none."""
        named = (self.named or {}).get(f"{name}_token")
        ids = (self.backend.token_to_id(spelling) for spelling in ([named] if named else ROLES[name]))
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
        for name in ("chat_template.jinja", "special_tokens_map.json"):  # older ones would be read too
            (folder / name).unlink(missing_ok=True)
        extra: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if isinstance(self.backend, SentencePiece):
            extra = dict(self.backend.settings)
            self.backend.save(folder)
        else:
            (folder / FILE).write_text(self.backend.to_str())
            for name in (MARIAN[0], ADDED):  # older ones would be read beside it
                (folder / name).unlink(missing_ok=True)
            if self.bos_id is not None:  # tokenizer.json decides; folders of ours without this line are older than that
                extra["add_bos_token"] = self.rule.begin == (self.bos_id,)
        extra |= self._parts() | self.special_tokens
        if self.eos_ids:
            extra["eos_token_ids"] = list(self.eos_ids)
        if self.role("mask") is not None:
            types = ["token_type_ids"] if self.token_types else []  # which transformers 5 leaves out by default
            extra["model_input_names"] = ["input_ids", *types, "attention_mask"]
        if self.chat_template is not None:
            extra["chat_template"] = self.chat_template
        if self.tool_template is not None:
            templates = {"default": self.chat_template, "tool_use": self.tool_template}
            extra["chat_template"] = [{"name": n, "template": t} for n, t in templates.items() if t is not None]
        (folder / "tokenizer_config.json").write_text(json.dumps(extra, indent=2) + "\n")
