"""Reads the tokenizer that a folder holds."""

from typing import Any

import tokenizers
from etils import epath

from llm_jax.data import sentencepiece
from llm_jax.data.sentencepiece import FILE, SentencePiece, TokenizerError, read_json
from llm_jax.data.tokenizer import END_OF_TEXT, Tokenizer


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
