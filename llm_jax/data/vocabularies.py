"""Folders with a vocabulary and no `tokenizer.json`: GPT-2's and RoBERTa's two files, GPT-1's, Qwen's, BERT's list.

What a vocabulary is cut with stands in no file: it belongs to the class that transformers gives the model.

Source: transformers' `GPT2Tokenizer`, `RobertaTokenizer`, `Qwen2Tokenizer`, `OpenAIGPTTokenizer` and `BertTokenizer`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llm_jax.data.sentencepiece import FILE, TokenizerError, read_json
from llm_jax.data.tokenizer import Rule, rule_of, set_rule

MERGED = ("vocab.json", "merges.txt")
LISTED = "vocab.txt"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class FamilyError(TokenizerError):
    """A vocabulary that stands alone, and nothing that says how its texts are cut."""


class Kind(NamedTuple):
    """A class of tokenizers.

    Attributes:
      names: transformers' class and the model types that have it.
      listed: whether its vocabulary is a list of entries (`vocab.txt`); None where it never stands alone.
      special: entries that play a part where the settings say nothing.
      framed: whether texts stand between `cls_token` and `sep_token`, whatever the settings say.
    """

    names: tuple[str, ...]
    listed: bool | None
    special: dict[str, str]
    framed: bool = False


def _roles(pattern: str, *names: str) -> dict[str, str]:
    return {f"{name}_token": pattern.format(name) for name in names}


_END = "<|endoftext|>"
KINDS = {
    "gpt2": Kind(("GPT2Tokenizer", "gpt2"), False, dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)),
    "roberta": Kind(
        ("RobertaTokenizer", "roberta"),
        False,
        {
            **{"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
            **_roles("<{}>", "unk", "pad", "mask"),
        },
        True,
    ),
    "qwen2": Kind(
        ("Qwen2Tokenizer", "qwen2", "qwen3"), False, dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END)
    ),
    "llama": Kind(("LlamaTokenizer",), None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gemma": Kind(("GemmaTokenizer",), None, _roles("<{}>", "bos", "eos", "unk", "pad", "mask")),
    "openai": Kind(("OpenAIGPTTokenizer", "openai-gpt"), False, {"unk_token": "<unk>"}),
    "bert": Kind(
        ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "bert", "distilbert", "electra"),
        True,
        {name: f"[{name[:-6].upper()}]" for name in _roles("", "unk", "sep", "pad", "cls", "mask")},
        True,
    ),
}


def exists(folder: epath.Path) -> bool:
    """Whether a folder holds a vocabulary, and nothing that stands for it."""
    return not (folder / FILE).exists() and (_merged(folder) or (folder / LISTED).exists())


def _merged(folder: epath.Path) -> bool:
    return all((folder / name).exists() for name in MERGED)


def kind_of(folder: epath.Path, settings: Mapping[str, Any]) -> str | None:
    """The kind of the class that the tokenizer's settings name, or else the model's config; None for any other."""
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    names = settings.get("tokenizer_class"), config.get("tokenizer_class"), config.get("model_type")
    name = str(next((n for n in names if n), "")).removesuffix("Fast")
    return next((kind for kind, its in KINDS.items() if name in its.names), None)


def spelling(value: Any) -> str | None:
    """The text of a token that settings give as text or as an object; None for anything else, and for no text."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) and value else None


def read(folder: epath.Path, kind: str | None, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a vocabulary, with neither added tokens nor a rule.

    Args:
      folder: where.
      kind: see `kind_of`.
      settings: of its `tokenizer_config.json`, with the special tokens of its kind.

    Raises:
      FamilyError: if nothing names a family that has such a vocabulary.
      TokenizerError: if a file is damaged.
    """
    files = MERGED if _merged(folder) else (LISTED,)
    fitting = [name for name, k in KINDS.items() if k.listed == (files == (LISTED,))]
    if kind not in fitting:
        names = ", ".join(KINDS[name].names[0] for name in fitting)
        raise FamilyError(
            f"{folder} holds {' and '.join(files)} and no {FILE}, which may be of any family: name it in "
            f"tokenizer_config.json's tokenizer_class or config.json's model_type; there are {names}"
        )
    try:
        return _listed(folder, settings) if kind == "bert" else _merging(folder, kind, settings)
    except Exception as e:  # the library raises what it likes
        raise TokenizerError(f"{' and '.join(files)} in {folder} cannot be read: {e}") from e


def give_rule(backend: tokenizers.Tokenizer, kind: str | None, settings: Mapping[str, Any], flags: bool) -> None:
    """Gives a backend without a rule the one of its class, `[CLS] text [SEP]`, or the one that the flags ask for.

    Args:
      backend: where.
      kind: see `kind_of`.
      settings: with the special tokens of its kind.
      flags: whether `add_bos_token` and `add_eos_token` count; beside a `tokenizer.json` they do not.
    """
    if any(rule_of(backend)):
        return

    def end(name: str) -> tuple[str, int] | None:
        entry = spelling(settings.get(f"{name}_token"))
        index = None if entry is None else backend.token_to_id(entry)
        return None if entry is None or index is None else (entry, index)

    if kind is None or not KINDS[kind].framed:
        asked = [end(name) if flags and settings.get(f"add_{name}_token") else None for name in ("bos", "eos")]
        begin, behind = (() if found is None else (found[1],) for found in asked)
        if begin or behind:
            set_rule(backend, Rule(begin, behind))
        return
    cls, sep = end("cls"), end("sep")
    if cls is None or sep is None:
        return
    if kind == "roberta":
        trim, prefix = settings.get("trim_offsets", True), bool(settings.get("add_prefix_space", False))
        backend.post_processor = processors.RobertaProcessing(sep, cls, trim, prefix)
    else:
        backend.post_processor = processors.BertProcessing(sep, cls)


def _listed(folder: epath.Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    lines = (folder / LISTED).read_text("utf-8-sig").split("\n")
    vocab = {line.rstrip(): i for i, line in enumerate(lines) if line or i + 1 < len(lines)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=spelling(settings["unk_token"])))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _merging(folder: epath.Path, kind: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab = read_json(folder / MERGED[0])
    lines = (folder / MERGED[1]).read_text("utf-8-sig").split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        first, _, second = line.rstrip(" \r").partition(" ")
        if first and not line.startswith("#version"):
            if not second or " " in second:
                raise ValueError(f"{MERGED[1]}:{number} is not a pair of entries: {line[:50]!r}")
            merges.append((first, second))
    if kind == "openai":
        model = models.BPE(vocab, merges, unk_token=spelling(settings["unk_token"]), end_of_word_suffix="</w>")
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        return backend
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    prefix = bool(settings.get("add_prefix_space", False))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = split(QWEN2, prefix)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def split(expression: str, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    """Cuts at an expression's matches, then spells bytes."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"), plain])
