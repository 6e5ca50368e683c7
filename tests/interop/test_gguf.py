"""GGUF: a file written as llama.cpp's converter writes it loads bitwise; its tokenizers cut as theirs do."""

import functools
import json
import math
import random

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import noise
from tokenizers import pre_tokenizers

from llm_jax import interop
from llm_jax.data import chat, tokenizers
from llm_jax.data.tokenizer import Rule
from llm_jax.interop import InteropError
from llm_jax.interop.gguf import config_of, tokenizer_of
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths
from llm_jax.nn.positions import RotaryScaling

SMALL = dict(vocab_size=40, context_length=64, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64,
             norm_eps=1e-6)  # fmt: skip
CONFIGS = {
    "llama": ("llama", LlamaConfig(**SMALL, head_dim=8, tied=False)),
    "tied": ("llama", LlamaConfig(**SMALL, head_dim=8, rope_theta=500.0)),
    "linear": ("llama", LlamaConfig(**SMALL, head_dim=8, rope_scaling=RotaryScaling("linear", 2.0, 64))),
    "llama3": ("llama", LlamaConfig(**SMALL, head_dim=16, rope_theta=5e5, rope_scaling=RotaryScaling("llama3", 32.0))),
    "mistral": ("llama", LlamaConfig(**SMALL, head_dim=8, window=6)),
    "qwen2": ("qwen2", LlamaConfig(**SMALL, head_dim=8, qkv_bias=True)),
    "qwen3": ("qwen3", LlamaConfig(**SMALL, head_dim=16, qk_norm=True)),
}
NAMES = {
    "attention_norm/scale": "attn_norm", "mlp_norm/scale": "ffn_norm", "attention/query_norm/scale": "attn_q_norm",
    "attention/key_norm/scale": "attn_k_norm", "attention/query": "attn_q", "attention/key": "attn_k",
    "attention/value": "attn_v", "attention/out": "attn_output", "mlp/gate": "ffn_gate", "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}  # fmt: skip


@functools.cache
def made(config):
    return jax.tree.map(np.asarray, noise(config.make(), 1.0))


def permuted(rows, heads):
    """As `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py: pairs (i, i + H/2) become neighbours."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(kind, config):
    """Their names and `[out, in]` layout."""
    out = {}
    for path, x in paths.flatten(made(config)):
        if not path.startswith("decoder/layers/"):
            name = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}[path.split("/")[0]]
            out[f"{name}.weight"] = x.T if path.startswith("head") else x
            continue
        place, _, leaf = path.removeprefix("decoder/layers/").rpartition("/")
        name = NAMES.get(place) or NAMES[f"{place}/{leaf}"]
        for layer, y in enumerate(x):
            y = y.T if leaf == "kernel" else y
            if kind == "llama" and name in ("attn_q", "attn_k"):
                y = permuted(y, config.num_heads if name == "attn_q" else config.num_kv_heads)
            out[f"blk.{layer}.{name}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(y)
    return out


def write(path, kind, config, quantization=None, leave_out=(), more=lambda writer: None):
    writer = gguf.GGUFWriter(path, kind)
    entries = {
        "block_count": config.num_layers, "context_length": config.context_length, "embedding_length": config.model_dim,
        "feed_forward_length": config.hidden_dim, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.attention.head_dim,
    }  # fmt: skip
    for name, value in entries.items():
        if name not in leave_out:
            writer.add_uint32(f"{kind}.{name}", value)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.window:
        writer.add_sliding_window(config.window)
    scaling = config.rope_scaling
    if scaling and scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    everything = tensors(kind, config)
    if scaling and scaling.kind == "llama3":
        everything["rope_freqs.weight"] = llama3_factors(config.attention.head_dim, config.rope_theta, scaling.factor)
    more(writer)
    for name, x in everything.items():
        if name in leave_out:
            continue
        if quantization is None or x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quantize(x, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(dim, base, factor, low=1.0, high=4.0, context=8192):
    """As `LlamaModel.generate_extra_tensors` there."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loads_bitwise(name, tmp_path):
    kind, config = CONFIGS[name]
    loaded = interop.load(write(tmp_path / "a.gguf", kind, config))
    assert loaded.config == config and loaded.tokenizer is None
    found, want = dict(paths.flatten(loaded.params)), dict(paths.flatten(made(config)))
    assert found.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_logits_of_a_loaded_file(tmp_path):
    kind, config = CONFIGS["llama"]
    loaded = interop.load(write(tmp_path / "a.gguf", kind, config))
    forward = jax.jit(lambda p: config.make().apply({"params": p}, np.arange(12, dtype=np.int32)[None]).logits)
    np.testing.assert_array_equal(forward(loaded.params), forward(jax.tree.map(jnp.asarray, made(config))))


def test_quantized_tensors_load_as_their_dequantized_values(tmp_path):
    kind, config = CONFIGS["tied"]
    eight = gguf.GGMLQuantizationType.Q8_0
    loaded = interop.load(write(tmp_path / "a.gguf", kind, config, eight), dtype=jnp.bfloat16).params
    for path, x in paths.flatten(made(config)):
        rows = np.swapaxes(x, -1, -2) if path.endswith("kernel") else x
        norm = path.endswith("scale")
        rows = rows if norm else gguf.dequantize(gguf.quantize(np.ascontiguousarray(rows), eight), eight)
        want = np.swapaxes(rows, -1, -2) if path.endswith("kernel") else rows
        found = dict(paths.flatten(loaded))[path]
        np.testing.assert_array_equal(found, jnp.asarray(want, jnp.bfloat16), err_msg=path)


def entry(kind, *values):
    return {"more": lambda writer: getattr(writer, f"add_{kind}")(*values)}


BROKEN = [
    (("gpt2", "llama"), {}, "GGUF architecture 'gpt2' is not supported; there are llama, qwen2, qwen3"),
    (("llama", "llama"), {"leave_out": ("block_count",)}, "the GGUF lacks llama.block_count"),
    (("llama", "llama"), {"leave_out": ("token_embd.weight",)}, "the GGUF lacks token_embd.weight"),
    (("llama", "llama"), {"leave_out": ("blk.1.ffn_up.weight",)}, "missing blk.1.ffn_up.weight"),
    (("llama", "llama"), {"more": lambda w: w.add_tensor("extra", np.ones(2, np.float32))}, "unexpected extra"),
    (("llama", "llama"), {"more": lambda w: w.add_uint16("split.count", 2)}, "split over several files"),
    (("llama", "llama"), entry("string", "general.type", "adapter"), "no model but general.type='adapter'"),
    (("llama", "llama"), entry("expert_count", 8), "a mixture of experts, llama.expert_count=8"),
    (("llama", "llama"), entry("rope_dimension_count", 4), "llama.rope.dimension_count=4, only the head's size 8"),
    (("llama", "llama"), entry("value_length", 4), "llama.attention.value_length=4, only the head's size 8"),
    (("llama", "llama3"), entry("rope_scaling_factor", 2.0), "scales rotary positions twice"),
    (("llama", "llama"), entry("rope_scaling_type", gguf.RopeScalingType.LONGROPE), "'longrope' is not supported"),
    (("llama", "llama"), entry("rope_scaling_attn_factors", 1.5), "attn_factor=1.5 is not supported with linear"),
    (("llama", "tied"), {"more": lambda w: w.add_tensor("rope_freqs.weight", np.full(4, 3, np.float32))}, "Llama 3's"),
    (("llama", "llama"), {"more": lambda w: w.add_tokenizer_model("t5")}, "lacks tokenizer.ggml.tokens"),
]  # fmt: skip


def yarn(writer, **more):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)
    for name, value in more.items():
        writer.add_float32(f"llama.rope.scaling.{name}", value)


USUAL = 0.1 * math.log(4) + 1  # YaRN's factor on cosines and sines
SCALINGS = [  # as llama.cpp reads them
    (lambda w: w.add_rope_scaling_factor(4.0), RotaryScaling("linear", 4.0, 64)),
    (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), RotaryScaling("linear", 4.0, 64)),
    (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
    (lambda w: [w.add_rope_scaling_type(gguf.RopeScalingType.NONE), w.add_rope_scaling_factor(4.0)], None),
    (lambda w: w.add_rope_scaling_factor(1.0), None),
    (yarn, RotaryScaling("yarn", 4.0, 16)),
    (lambda w: yarn(w, attn_factor=0.5), RotaryScaling("yarn", 4.0, 16, attention_factor=0.5 * USUAL)),
    (
        lambda w: yarn(w, yarn_beta_fast=16.0, yarn_beta_slow=2.0),
        RotaryScaling("yarn", 4.0, 16, beta_fast=16.0, beta_slow=2.0),
    ),
]


@pytest.mark.parametrize("add, want", SCALINGS)
def test_rotary_scalings(add, want, tmp_path):
    found = interop.load(write(tmp_path / "a.gguf", "llama", CONFIGS["llama"][1], more=add)).config
    assert found.rope_scaling == want


LISTED = {"feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2, "block_count": 2}


@pytest.mark.parametrize("name, value", {**LISTED, "attention.key_length": 8}.items())
def test_equal_numbers_of_layers_are_one(name, value, tmp_path):
    config = CONFIGS["llama"][1]

    def load(values):
        more = entry("array", f"llama.{name}", values)
        return interop.load(write(tmp_path / "a.gguf", "llama", config, leave_out=(name,), **more))

    assert load([value, value]).config == config
    with pytest.raises(InteropError, match=f"the GGUF gives layers different llama.{name}: .*only equal ones"):
        load([value, value + 1])


@pytest.mark.parametrize("which, options, message", BROKEN)
def test_what_cannot_be_loaded_is_one_line(which, options, message, tmp_path):
    path = write(tmp_path / "a.gguf", which[0], CONFIGS[which[1]][1], **options)
    with pytest.raises(InteropError) as error:
        interop.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"split.no": 1, "split.count": 3}, "file 2 of a model split over several files, 3 in all"),  # it says no more
        ({"general.type": "adapter", "adapter.type": "lora"}, r"general.type='adapter' \(lora\)"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "general.type='mmproj'"),
        ({"general.architecture": "llama", "llama.expert_count": 0}, "the GGUF lacks llama.attention.head_count"),
    ],
)
def test_other_files_are_refused_by_what_they_are(metadata, message):
    class File(dict):
        pass

    file = File({"token_embd.weight": None})
    file.metadata = metadata
    with pytest.raises(InteropError, match=message):
        config_of(file)


@pytest.fixture(scope="module")
def byte_level():
    texts = ["the cat sat on the mat, 1234 times", "don't you'll we've", "naïve 😀 x  y\n\nz"] * 6
    return tokenizers.train(texts, "bpe", 330, ("<|end|>", "<|user|>"))


def byte_level_metadata(tokenizer, **changes):
    model = json.loads(tokenizer.backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(m) if isinstance(m, list) else m for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{ x }}",
        **{f"tokenizer.ggml.{k}": v for k, v in changes.items()},
    }  # fmt: skip


def test_byte_level_vocabularies_cut_as_the_original(byte_level):
    found = tokenizer_of(byte_level_metadata(byte_level))
    for text in ["the mat don't <|end|>we've  12345\n\n x", "naïve 😀😀", "\x00 \t unseen ж", ""]:
        assert found.encode(text) == byte_level.encode(text)
        assert found.decode(found.encode(text), skip_special_tokens=False) == text
    assert (found.bos_id, found.eos_ids, found.chat_template) == (0, (1,), "{{ x }}") and found.rule == Rule()
    assert found.decode([0, *found.encode("the")]) == "the"
    added = tokenizer_of(byte_level_metadata(byte_level, add_bos_token=True, eot_token_id=0))
    assert (added.bos_id, added.eos_ids) == (0, (1, 0)) and added.rule == Rule((0,))


def test_where_the_file_does_not_say_what_stands_around_a_text(byte_level):
    """Llama 3's and SentencePiece's vocabularies put a begin token there, others none; a template names it anyway."""
    template = "{{ bos_token }}{{ messages[0].content }}"
    rows = [
        (byte_level_metadata, {"pre": "gpt-2"}, Rule()),
        (byte_level_metadata, {"pre": "qwen2"}, Rule()),
        (byte_level_metadata, {"pre": "llama-bpe"}, Rule((0,))),
        (byte_level_metadata, {"pre": "llama-bpe", "add_bos_token": False}, Rule()),
        (byte_level_metadata, {"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, Rule((0,), (1,))),
        (sentence_piece_metadata, {}, Rule((1,))),
        (sentence_piece_metadata, {"add_bos_token": False, "add_eos_token": True}, Rule((), (2,))),
    ]
    for make, changes, rule in rows:
        metadata = make(**changes) if make is sentence_piece_metadata else make(byte_level, **changes)
        tokens = metadata["tokenizer.ggml.tokens"]
        metadata |= {"tokenizer.chat_template": template}
        found = tokenizer_of(metadata)
        assert found.rule == rule, changes
        bare = found.encode("ab")
        assert found.encode_texts(["ab"]) == [[*rule.begin, *bare, *rule.end]]
        begin = tokens[metadata["tokenizer.ggml.bos_token_id"]]
        assert chat.render(found, [{"role": "user", "content": "x"}]) == f"{begin}x"


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "gpt-2", "qwen2"])
def test_whole_entries_come_before_merges_where_llama_3_says_so(pre):
    """An entry that no merge makes is found whole, or never."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "ab", "cd", "abcd", "<|end|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "c d"], "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }  # fmt: skip
    found = tokenizer_of(metadata)
    pieces = [found.token(i) for i in found.encode("abcd abd")]
    assert pieces == [*(["abcd"] if pre.startswith("llama") else ["ab", "cd"]), "\u0120", "ab", "d"]


SPLITS = [
    ("gpt-2", "it's 12345  x", ["it", "'s", " 12345", " ", " x"]),
    ("smollm", "it's 12345  x", ["it", "'s", " ", "1", "2", "3", "4", "5", " ", " x"]),
    ("llama-bpe", "it'S 12345\n\n x (a)", ["it", "'S", " ", "123", "45", "\n\n", " x", " (", "a", ")"]),
    ("llama3", "12345", ["123", "45"]),
    ("deepseek-r1-qwen", "123", ["1", "2", "3"]),
    ("qwen2", "it's 123\n x", ["it", "'s", " ", "1", "2", "3", "\n", " x"]),
]


@pytest.mark.parametrize("pre, text, want", SPLITS)
def test_pre_tokenizers_cut_as_named(pre, text, want, byte_level):
    found = tokenizer_of(byte_level_metadata(byte_level, pre=pre)).backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in found] == want


PIECES = ["ab", "▁a", "bc", "cd", "abc", "▁ab", "bcd", "▁c", "▁cd", "abcd", "▁abc", "de", "cde", "▁d", "▁de"]


def sentence_piece_metadata(**changes):
    rng = random.Random(0)
    control = ["<unk>", "<s>", "</s>"]
    tokens = [*control, *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *"▁abcde"]
    scores = {p: -float(i) for i, p in enumerate(rng.sample(PIECES, len(PIECES)))}
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(t, -1000.0 if t in "▁abcde" else 0.0) for t in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) + 6),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{k}": v for k, v in changes.items()},
    }  # fmt: skip


def sentence_piece(text, metadata):
    """Brute force: the neighbours whose union has the highest score merge first; what is unknown falls into bytes."""
    tokens, scores = (metadata[f"tokenizer.ggml.{n}"] for n in ("tokens", "scores"))
    vocab = {t: i for i, t in enumerate(tokens)}
    cut = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (scores[vocab[a + b]], -i) for i, (a, b) in enumerate(zip(cut, cut[1:], strict=False)) if a + b in vocab
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        cut[i : i + 2] = [cut[i] + cut[i + 1]]
    return [i for p in cut for i in ([vocab[p]] if p in vocab else [vocab[f"<0x{b:02X}>"] for b in p.encode()])]


def test_sentence_piece_vocabularies_cut_by_score():
    metadata = sentence_piece_metadata()
    found = tokenizer_of(metadata)
    rng = random.Random(1)
    texts = ["".join(rng.choice("abcde  é😀") for _ in range(rng.randrange(1, 30))) for _ in range(300)]
    for text in texts:
        assert found.encode(text) == sentence_piece(text, metadata), text
        assert found.decode(found.encode(text)) == text
    assert (found.bos_id, found.eos_ids) == (1, (2,))
    assert found.encode("</s>") == [2]


def test_a_padding_token_that_is_not_there_is_left_out(byte_level, caplog):
    found = tokenizer_of(byte_level_metadata(byte_level, padding_token_id=2**32 - 1))
    assert found.special_tokens.get("pad_token") is None and "the GGUF's pad token has the id 4294967295" in caplog.text


TOKENIZER_ERRORS = [
    ({"model": "t5"}, "GGUF tokenizer model 't5' is not supported; there are gpt2, llama"),
    ({"pre": "tekken"}, "GGUF pre-tokenizer 'tekken' is not supported"),
    ({"token_type": [1]}, "tokens and 1 token types"),
    ({"eos_token_id": 9999}, "the GGUF's eos token has the id 9999"),
    ({"model": "llama"}, "the GGUF lacks tokenizer.ggml.scores"),
]


@pytest.mark.parametrize("changes, message", TOKENIZER_ERRORS)
def test_tokenizers_that_cannot_be_read(changes, message, byte_level):
    with pytest.raises(InteropError, match=message):
        tokenizer_of(byte_level_metadata(byte_level, **changes))


def test_a_tokenizer_inside_a_file(byte_level, tmp_path):
    def add(writer):
        m = byte_level_metadata(byte_level)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(m["tokenizer.ggml.tokens"])
        writer.add_token_types(m["tokenizer.ggml.token_type"])
        writer.add_token_merges(m["tokenizer.ggml.merges"])
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ x }}")

    found = interop.load(write(tmp_path / "a.gguf", *CONFIGS["tied"], more=add)).tokenizer
    assert found.encode("the cat 😀") == byte_level.encode("the cat 😀")
    assert (found.bos_id, found.eos_ids, found.chat_template) == (None, (1,), "{{ x }}")  # it names no other
