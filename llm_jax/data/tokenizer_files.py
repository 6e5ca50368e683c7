"""Reads the tokenizer that a folder holds, with what stands beside it, as transformers does.

Source: transformers' `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend` (version 5) for which file
decides, and in which order tokens beside a `tokenizer.json` are added.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from etils import epath

from llm_jax.data import sentencepiece, vocabularies
from llm_jax.data.sentencepiece import ADDED, FILE, SentencePiece, TokenizerError, read_entries, read_json
from llm_jax.data.tokenizer import END_OF_TEXT, NAMES, Rule, Tokenizer, rule_of, set_rule
from llm_jax.data.vocabularies import spelling

log = logging.getLogger(__name__)
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # now and in older folders


def exists(folder: epath.PathLike) -> bool:
    """Whether a folder holds a tokenizer that `load` reads."""
    folder = epath.Path(folder)
    return (folder / FILE).exists() or sentencepiece.exists(folder) or vocabularies.exists(folder)


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a tokenizer: a `tokenizer.json`, SentencePiece's files, or a vocabulary alone.

    The files beside it say which of its entries play a part, and may add entries.

    Args:
      path: the folder, or the `tokenizer.json` in it.

    Raises:
      TokenizerError: if there is none, or it cannot be parsed.
    """
    path = epath.Path(path)
    folder, file = (path, path / FILE) if path.is_dir() else (path.parent, path)
    settings, named = _settings(folder)
    ours = "eos_token_ids" in settings  # written by `Tokenizer.save`
    backend: Any
    target: Any
    if path.is_dir() and sentencepiece.exists(folder):
        backend, target = sentencepiece.read(folder, settings)
        settings = {**settings, **backend.settings}
    else:
        kind = vocabularies.kind_of(folder, settings)
        usual = {} if kind is None else vocabularies.KINDS[kind].special
        alone = path.is_dir() and vocabularies.exists(folder)
        backend = target = vocabularies.read(folder, kind, {**usual, **settings}) if alone else _parsed(file)
        usual = {name: entry for name, entry in usual.items() if backend.token_to_id(entry) is not None}
        settings = {**usual, **settings}
        if not ours:  # where every entry is in tokenizer.json
            _add_tokens(backend, folder, settings)
        vocabularies.give_rule(backend, kind, settings, flags=alone)

    spelled = {name: entry for name, entry in _named(settings) if backend.token_to_id(entry) is not None}
    bos = backend.token_to_id(spelled["bos_token"]) if "bos_token" in spelled else None
    older = ours and "add_bos_token" not in settings and not isinstance(backend, SentencePiece)
    if older and bos is not None and not rule_of(backend).begin:  # when bos_token said what stands in front
        set_rule(backend, Rule((bos,)))
    templates = _templates(folder, settings)
    rest = (bos, _eos_ids(backend, folder, settings, named), templates.get("default"), spelled)
    tokenizer = Tokenizer(backend, *rest)
    tokenizer.tool_template = templates.get("tool_use")
    if target is not backend:
        tokenizer.target = Tokenizer(target, *rest)
    return tokenizer


def _settings(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer's settings, and `special_tokens_map.json` alone.

    That map counts among the settings where `tokenizer_config.json` lists no added tokens itself.
    """
    settings, named = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
    return (settings if "added_tokens_decoder" in settings else {**settings, **named}), named


def _read(file: epath.Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _parsed(file: epath.Path) -> tokenizers.Tokenizer:
    if not file.exists():
        raise TokenizerError(f"no tokenizer at {file}")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as e:
        raise TokenizerError(f"{file} is not a tokenizer.json: {e}") from e
    backend.no_padding()
    backend.no_truncation()
    return backend


def _extra(settings: Mapping[str, Any]) -> Any:
    """Further special tokens: a list of them, or an object that names them."""
    name, value = next(((key, settings[key]) for key in EXTRA if settings.get(key)), ("", []))
    if not isinstance(value, (list, Mapping)):
        raise TokenizerError(f"{name}={value!r} must be a list of tokens, or an object that names them")
    return value


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The special tokens that settings name: those with a part, then a model's own (`image_token`)."""
    others = [name for name in settings if name.endswith("_token") and name not in NAMES]
    extra = _extra(settings)
    values = {name: settings.get(name) for name in (*NAMES, *others)}
    values |= extra if isinstance(extra, dict) else {}
    for name, value in values.items():
        if name in NAMES and not (value is None or isinstance(value, (str, Mapping))):
            raise TokenizerError(f"{name}={value!r} is not a token: give its text, or null")
        entry = spelling(value)
        if entry is not None:
            yield name, entry


def _token(value: Any, **more: Any) -> tokenizers.AddedToken:
    fields = ("single_word", "lstrip", "rstrip", "normalized")
    given = {k: value[k] for k in fields if k in value} if isinstance(value, Mapping) else {}
    return tokenizers.AddedToken(spelling(value), **{**more, **given})


def _add_tokens(backend: tokenizers.Tokenizer, folder: epath.Path, settings: Mapping[str, Any]) -> None:
    """Adds the entries that stand beside the vocabulary only, in transformers' order, each with the next free id."""
    extra = _extra(settings)
    objects = {spelling(value): value for value in settings.values() if isinstance(value, Mapping)}
    special: dict[Any, Any] = {entry: objects.get(entry, entry) for _, entry in _named(settings)}
    special |= {spelling(value): value for value in extra if spelling(value) and not isinstance(extra, Mapping)}
    placed: dict[int, tokenizers.AddedToken] = {}
    for index, value in (settings.get("added_tokens_decoder") or {}).items():
        if not index.isdecimal() or spelling(value) is None or not isinstance(value, Mapping):
            raise TokenizerError(
                f"{folder}: added_tokens_decoder has {index!r}: {value!r}, which is not an id with a token"
            )
        placed[int(index)] = _token(value, special=bool(value.get("special", False)))
    if "added_tokens_decoder" not in settings:
        for entry, index in (read_entries(folder / ADDED) if (folder / ADDED).exists() else {}).items():
            placed[index] = _token(entry, special=entry in special, normalized=entry not in special)
    here = list(backend.get_added_tokens_decoder().values())
    same = {repr(token) for token in here}
    new = [token for _, token in sorted(placed.items()) if repr(token) not in same]
    added = {token.content for token in (*here, *new)}
    named = {entry for _, entry in _named(settings)}
    for entry, value in special.items():
        if entry not in added:  # an object in a list says itself whether it stands for no text
            says = isinstance(value, Mapping) and entry not in named
            new.append(_token(value, special=bool(value.get("special", False)) if says else True))
    backend.add_tokens(new)
    for index, token in placed.items():
        found = backend.token_to_id(token.content)
        if found != index:
            log.warning("%s gives %r the id %d; the next free one is %d", folder, token.content, index, found)


def _eos_ids(backend: Any, folder: epath.Path, settings: Mapping[str, Any], named: Mapping[str, Any]) -> list[int]:
    """What ends a text, from all files; the tokenizer's own first, because it separates documents."""
    entries = [spelling(place.get("eos_token")) for place in (settings, named)]
    found = [backend.token_to_id(entry) for entry in entries if entry is not None]
    by_file = {"tokenizer_config.json": settings.get("eos_token_ids")}
    by_file |= {name: _read(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")}
    for name, value in by_file.items():
        ids = value if isinstance(value, list) else [value]
        if any(i is not None and (isinstance(i, bool) or not isinstance(i, int)) for i in ids):
            raise TokenizerError(f"{folder / name}: eos_token_id={value!r} is neither an id nor a list of ids")
        found += [i for i in ids if i is not None and i >= 0]
    ids = list(dict.fromkeys(i for i in found if i is not None))
    if not any(backend.id_to_token(i) is not None for i in ids):
        usual = backend.token_to_id(END_OF_TEXT)
        ids = ids if usual is None else [usual, *ids]
    return sorted(ids, key=lambda i: backend.id_to_token(i) is None)  # an id without an entry separates nothing


def _templates(folder: epath.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: the file of its own stands before those in the settings."""
    beside = folder / "chat_template.jinja"
    found = beside.read_text() if beside.exists() else settings.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
    templates = dict(found) if isinstance(found, Mapping) else {} if found is None else {"default": found}
    wrong = next((template for template in templates.values() if not isinstance(template, str)), None)
    if wrong is not None:
        raise TokenizerError(f"{folder}: chat_template={wrong!r} is not text")
    if templates and "default" not in templates:
        log.warning("%s: of the chat templates %s none is the default one", folder, ", ".join(map(str, templates)))
    return templates
