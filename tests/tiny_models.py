"""One table of tiny models, held to every property; adding a model is adding a row."""

import functools
from typing import Any

import jax
import numpy as np

from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.positions import RotaryScaling

V, CONTEXT = 31, 16
GPT = dict(vocab_size=V, context_length=CONTEXT, model_dim=12, num_layers=2, num_heads=3)
LLAMA = dict(
    vocab_size=V, context_length=CONTEXT, model_dim=12, num_layers=2, num_heads=6, num_kv_heads=2, hidden_dim=10,
    rope_theta=100.0,
)  # fmt: skip
BERT = dict(vocab_size=V, context_length=CONTEXT, model_dim=12, num_layers=3, num_heads=3, hidden_dim=10)

MODELS: dict[str, Any] = {
    "gpt2": GPTConfig(**GPT),
    "gpt1": GPTConfig(**GPT, norm="post", activation="gelu", hidden_dim=10),
    "gpt_untied_padded": GPTConfig(**GPT, tied=False, vocab_pad_multiple=8),
    **{f"gpt_{kind}": GPTConfig(**GPT, positions=kind, max_distance=20) for kind in ("sinusoidal", "alibi", "t5")},
    **{
        f"gpt_{kind}": GPTConfig(**GPT, positions=kind, max_distance=3)
        for kind in ("rotary", "shaw", "xlnet", "deberta")
    },
    "llama": LlamaConfig(**LLAMA),
    "llama3_scaling": LlamaConfig(**LLAMA, rope_scaling=RotaryScaling("llama3", 4.0, original_length=8)),
    "mistral": LlamaConfig(**LLAMA, window=3, tied=False),
    "qwen2": LlamaConfig(**LLAMA, qkv_bias=True, vocab_pad_multiple=8),
    "qwen3": LlamaConfig(**LLAMA, qk_norm=True, head_dim=4, out_bias=True, mlp_bias=True),
    "bert_decoder": BertConfig(**BERT, head="masked_lm", pooler=None, causal=True, position_offset=2),
}

ENCODERS: dict[str, BertConfig] = {
    "bert": BertConfig(**BERT),
    "roberta": BertConfig(**BERT, num_token_types=1, position_offset=2, head="masked_lm", pooler=None),
    "distilbert": BertConfig(**BERT, num_token_types=0, head="masked_lm", pooler=None, tied=False),
    "albert": BertConfig(**BERT, embedding_dim=8, num_groups=2, activation="gelu_tanh", vocab_pad_multiple=8),
}

SEQ = dict(vocab_size=V, context_length=CONTEXT, model_dim=12, num_layers=2, num_decoder_layers=3, num_heads=3)
ENCODER_DECODERS: dict[str, Any] = {
    "transformer": TransformerConfig(**SEQ, hidden_dim=10),
    "transformer_pre": TransformerConfig(
        **SEQ, hidden_dim=10, norm="pre", tied=False, vocab_pad_multiple=8, num_decoder_heads=4, decoder_hidden_dim=14
    ),
    "marian": TransformerConfig(**SEQ, hidden_dim=10, sinusoids="halves", logits_bias=True, activation="silu"),
    "t5": T5Config(**SEQ, hidden_dim=10, head_dim=5, num_buckets=8, max_distance=6),
    "t5_1.1": T5Config(
        **SEQ, hidden_dim=10, head_dim=5, activation="gelu_tanh", gated=True, tied=False, scale_output=False,
        num_buckets=8, max_distance=6, vocab_pad_multiple=8,
    ),
}  # fmt: skip


def abstract(module: Any, *inputs: Any) -> tuple[Any, Any]:
    """(shapes of the parameters, their logical axes)."""
    boxed = jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
    return weights.split_axes(boxed)


def padded_rows(config: Any) -> int:
    """Rows of the token table."""
    return -(-config.vocab_size // config.vocab_pad_multiple) * config.vocab_pad_multiple


def count_bert(c: BertConfig) -> int:
    """Parameters in closed form: ALBERT's V E + E D for the tables, and G layers in the place of L."""
    d, f, e, rows = c.model_dim, c.hidden_dim, c.embedding_dim or c.model_dim, padded_rows(c)
    tables = (rows + c.context_length + c.position_offset + c.num_token_types) * e + 2 * e
    tables += e * d + d if c.embedding_dim else 0
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    head = d * e + e + 2 * e + rows + (0 if c.tied else rows * e)
    pair = 2 * d + 2 if c.head == "pretraining" else 0
    return tables + (c.num_groups or c.num_layers) * layer + head + pair + (d * d + d if c.pooler else 0)


def random_params(module: Any, *inputs: Any, seed: int = 0, dtype: str = "float32", std: float = 0.3) -> Any:
    """Numpy parameters, biases and norms random too, so that no term hides behind a 0 or a 1."""
    rng = np.random.default_rng(seed)
    draw = lambda path, x: (rng.normal(size=x.shape) * std + path.endswith("scale")).astype(dtype)
    return paths.map_with_path(draw, abstract(module, *inputs)[0])


def model_params(config: Any, **options: Any) -> Any:
    """`random_params` of a row of the table."""
    return random_params(config.make(), np.zeros((1, 4), np.int32), **options)


def noise(module: Any, std: float, seed: int = 0) -> Any:
    """Normal parameters of a decoder, made by numpy (nothing to compile), norms' scales too."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put((rng.normal(size=x.shape) * std).astype(x.dtype))
    return jax.tree.map(draw, abstract(module, np.zeros((1, 2), np.int32))[0])


@functools.partial(jax.jit, static_argnums=0)
def logits(config: Any, params: Any, ids: Any) -> jax.Array:
    """Of a row of the table."""
    return config.make().apply({"params": params}, ids).logits
