"""GGUF files of the Llama family: config, names, rotary layout, tokenizer.

GGUF's `llama` architecture stores query and key rows so that rotary pairs are neighbours; ours (and Hugging Face's)
pairs dimension i with i + H/2. The rows are put back on reading.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.positions import RotaryScaling, rotary_frequencies
from llm_jax.storage.gguf import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def config_of(file: GgufFile) -> LlamaConfig:
    """The model's config from the metadata.

    Raises:
      InteropError: if the architecture or its scaling is not supported, or an entry is missing.
    """
    m = file.metadata
    kind = m.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InteropError(f"GGUF architecture {kind!r} is not supported; there are {', '.join(ARCHITECTURES)}")
    if m.get("split.count", 1) > 1:
        raise InteropError("this GGUF is split over several files; merge them first")

    def need(name: str) -> Any:
        if f"{kind}.{name}" not in m:
            raise InteropError(f"the GGUF lacks {kind}.{name}")
        return m[f"{kind}.{name}"]

    def get(name: str, default: Any) -> Any:
        return m.get(f"{kind}.{name}", default)

    if "token_embd.weight" not in file:
        raise InteropError("the GGUF lacks token_embd.weight")
    heads, dim = int(need("attention.head_count")), int(need("embedding_length"))
    head_dim = int(get("attention.key_length", dim // heads))
    theta, context = float(get("rope.freq_base", 10000.0)), int(need("context_length"))
    scaling = None
    if get("rope.scaling.type", "none") not in ("none", None):
        scaling = RotaryScaling(
            get("rope.scaling.type", ""),
            float(get("rope.scaling.factor", 1.0)),
            original_length=int(get("rope.scaling.original_context_length", context)),
        )
    elif "rope_freqs.weight" in file:
        scaling = _llama3_scaling(file["rope_freqs.weight"], head_dim, theta)
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        context_length=context,
        model_dim=dim,
        num_layers=int(need("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        hidden_dim=int(need("feed_forward_length")),
        norm_eps=float(np.round(float(need("attention.layer_norm_rms_epsilon")), 12)),  # stored as float32
        tied="output.weight" not in file,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in file,
        out_bias="blk.0.attn_output.bias" in file,
        qk_norm="blk.0.attn_q_norm.weight" in file,
        window=get("attention.sliding_window", None),
    )


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RotaryScaling:
    """Llama 3's scaling is stored as one divisor per frequency; recognised by recomputing it."""
    scaling = RotaryScaling("llama3", float(factors.max()))
    plain, scaled = rotary_frequencies(head_dim, theta)[0], rotary_frequencies(head_dim, theta, scaling)[0]
    if not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise InteropError("rope_freqs.weight holds frequencies of a scaling other than Llama 3's")
    return scaling


def _from_neighbours(heads: int, head_dim: int) -> Any:
    """Undoes GGUF's row order on the last axis: pairs (2i, 2i+1) back to (i, i + H/2)."""

    def fix(w: np.ndarray) -> np.ndarray:
        split = w.reshape(*w.shape[:-1], heads, head_dim // 2, 2)
        return np.swapaxes(split, -1, -2).reshape(w.shape)

    return fix


def rules(config: LlamaConfig, architecture: str) -> list[Rule]:
    """Where everything is."""
    ours, theirs, h = "decoder/layers", "blk.{l}", config.attention.head_dim
    out = [Rule("embed/embedding", "token_embd.weight"), Rule("final_norm/scale", "output_norm.weight")]
    if not config.tied:
        out.append(Rule("head/kernel", "output.weight", transposed=True))
    norms = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    norms |= {"attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm"}
    out += [Rule(f"{ours}/{a}/scale", f"{theirs}.{b}.weight") for a, b in norms.items()]
    linears = {
        "attention/query": ("attn_q", config.num_heads), "attention/key": ("attn_k", config.num_kv_heads),
        "attention/value": ("attn_v", 0), "attention/out": ("attn_output", 0),
        "mlp/gate": ("ffn_gate", 0), "mlp/up": ("ffn_up", 0), "mlp/down": ("ffn_down", 0),
    }  # fmt: skip
    for a, (b, heads) in linears.items():
        fix = _from_neighbours(heads, h) if heads and architecture == "llama" else None
        out.append(Rule(f"{ours}/{a}/kernel", f"{theirs}.{b}.weight", transposed=True, forward=fix))
        out.append(Rule(f"{ours}/{a}/bias", f"{theirs}.{b}.bias", forward=fix))
    return out


def ignored(name: str) -> bool:
    """Their tensors without a counterpart."""
    return name in ("rope_freqs.weight",)


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
    types = list(metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    if len(types) != len(tokens):
        raise InteropError(f"the GGUF has {len(tokens)} tokens and {len(types)} token types")
    vocab = {t: i for i, t in enumerate(tokens)}
    if kind == "gpt2":
        backend = _byte_level(vocab, need("merges"), metadata.get("tokenizer.ggml.pre"))
    elif kind == "llama":
        backend = _sentence_piece(vocab, need("scores"), metadata)
    else:
        raise InteropError(f"GGUF tokenizer model {kind!r} is not supported; there are gpt2, llama")
    special = [
        tokenizers.AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 3
    ]
    user = [tokenizers.AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 4]
    backend.add_special_tokens(special)
    backend.add_tokens(user)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos = None
    eos = [metadata.get(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot")]
    return Tokenizer(
        backend,
        None if bos is None else int(bos),
        list(dict.fromkeys(int(i) for i in eos if i is not None)),
        metadata.get("tokenizer.chat_template"),
    )


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str | None) -> tokenizers.Tokenizer:
    pairs = [(a, b) for a, _, b in (m.partition(" ") for m in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = lambda regex: pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), plain])
    known: dict[str | None, Any] = {
        None: byte_level,
        "default": byte_level,
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": split(_LLAMA3),
        "qwen2": split(_QWEN2),
    }
    if pre not in known:
        raise InteropError(f"GGUF pre-tokenizer {pre!r} is not supported; there are {', '.join(map(str, known))}")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = known[pre]
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
