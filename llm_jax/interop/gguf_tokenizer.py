"""The tokenizer inside a GGUF file.

Source: llama.cpp's `llama_vocab::impl::load` for what a missing entry means.
"""

import logging
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llm_jax.data import vocabularies
from llm_jax.data.tokenizer import Rule, Tokenizer, set_rule
from llm_jax.interop.names import InteropError

log = logging.getLogger(__name__)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types
# names of the same pre-tokenizer; llama.cpp looks a whole word up before it merges, and puts a begin token in front
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer inside, None where the file has none.

    Raises:
      InteropError: if its kind is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None

    def need(name: str) -> list[Any]:
        if f"tokenizer.ggml.{name}" not in metadata:
            raise InteropError(f"the GGUF lacks tokenizer.ggml.{name}")
        return list(metadata[f"tokenizer.ggml.{name}"])

    tokens: list[str] = need("tokens")
    types = list(metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens)))
    if len(types) != len(tokens):
        raise InteropError(f"the GGUF has {len(tokens)} tokens and {len(types)} token types")
    vocab = {t: i for i, t in enumerate(tokens)}
    if kind == "gpt2":
        backend = _byte_level(vocab, need("merges"), metadata.get("tokenizer.ggml.pre"))
    elif kind == "llama":
        backend = _sentence_piece(vocab, need("scores"), metadata)
    else:
        raise InteropError(f"GGUF tokenizer model {kind!r} is not supported; there are gpt2, llama")
    of_type = lambda wanted: [token for token, found in zip(tokens, types, strict=True) if found == wanted]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in of_type(CONTROL)])
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in of_type(USER_DEFINED)])
    roles = _roles(metadata, len(tokens))
    usual = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3  # where the file does not say it
    begins = metadata.get("tokenizer.ggml.add_bos_token", usual) and "bos" in roles
    ends = metadata.get("tokenizer.ggml.add_eos_token") and "eos" in roles
    if begins or ends:
        set_rule(backend, Rule((roles["bos"],) if begins else (), (roles["eos"],) if ends else ()))
    return Tokenizer(
        backend,
        roles.get("bos"),
        list(dict.fromkeys(roles[name] for name in ("eos", "eot", "eom") if name in roles)),
        metadata.get("tokenizer.chat_template"),
        {f"{name}_token": tokens[index] for name, index in roles.items() if name not in ("eot", "eom")},
    )


def _roles(metadata: Mapping[str, Any], size: int) -> dict[str, int]:
    """Ids of the tokens that have a role, by role; one that lies beyond the vocabulary is an error or left out."""
    names = {**{name: name for name in ("bos", "eos", "eot", "eom")}, "unk": "unknown", "pad": "padding"}
    out = {}
    for name, theirs in names.items():
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is None:
            continue
        if 0 <= index < size:
            out[name] = int(index)
        elif name in ("bos", "eos"):
            raise InteropError(f"the GGUF's {name} token has the id {index}, it has {size} entries")
        else:
            log.warning("the GGUF's %s token has the id %d, beyond its %d entries: left out", name, index, size)
    return out


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str | None) -> tokenizers.Tokenizer:
    pairs = [(a, b) for a, _, b in (m.partition(" ") for m in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _LLAMA3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    supported: dict[str | None, Any] = {
        **dict.fromkeys((None, "default", "gpt-2"), byte_level),  # without a name we take GPT-2's, as transformers does
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        **dict.fromkeys(_LLAMA3, vocabularies.split(vocabularies.LLAMA3)),
        **dict.fromkeys(_QWEN2, vocabularies.split(vocabularies.QWEN2)),
    }
    if pre not in supported:
        raise InteropError(f"GGUF pre-tokenizer {pre!r} is not supported; there are {', '.join(map(str, supported))}")
    if pre in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = supported[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(vocab: dict[str, int], scores: list[float], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Llama 1 and 2: SentencePiece BPE, whose merges are implied by the scores of the merged pieces."""
    merges = []
    for piece in vocab:
        for cut in range(1, len(piece)):
            a, b = piece[:cut], piece[cut:]
            if a in vocab and b in vocab:
                merges.append((-scores[vocab[piece]], vocab[a], vocab[b], a, b))
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unknown = next((t for t, i in vocab.items() if i == metadata.get("tokenizer.ggml.unknown_token_id", 0)), None)
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail: list[Any] = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return backend
