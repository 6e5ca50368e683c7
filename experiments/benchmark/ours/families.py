"""BERT, T5, Marian, XLNet and ALBERT: encoding, decoding, training steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.ours.runtime import fresh, median_seconds
from llm_jax.decoding import prefill
from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.generate import Generator
from llm_jax.models.bert import BertConfig
from llm_jax.models.t5 import T5Config
from llm_jax.models.transformer import TransformerConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.training import flops
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

RNG = np.random.default_rng(0)
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(head="none", dropout=0.0, attention_dropout=0.0),
    "t5": T5Config(dropout=0.0),
    "marian": TransformerConfig(  # opus-mt-en-de's sizes
        vocab_size=58101, context_length=512, activation="silu", sinusoids="halves", logits_bias=True, dropout=0.0,
        start_id=58100,
    ),
    "xlnet": XLNetConfig(dropout=0.0),
    "albert": BertConfig(
        vocab_size=30000, embedding_dim=128, num_groups=1, activation="gelu_tanh", dropout=0.0, attention_dropout=0.0,
        head="masked_lm", pooler=None,
    ),
}  # fmt: skip
TINY: dict[str, Any] = dict(vocab_size=500, model_dim=32, num_layers=2, num_heads=2, hidden_dim=64)


def config_of(spec: dict[str, Any]) -> Any:
    """The family's, or a toy."""
    config = CONFIGS[spec["family"]]
    if not spec["tiny"]:
        return config
    return dataclasses.replace(config, **TINY, **({"start_id": 0} if hasattr(config, "start_id") else {}))


def encode(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second through an encoder."""
    config = config_of(spec)
    model, (rows, length) = config.make(), spec["shape"]
    params = unstack(fresh(model))
    ids = RNG.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    run = jax.jit(lambda p, ids: model.apply({"params": p}, ids).last_hidden_state)
    plain = config.make(flops.PLAIN)
    forward = lambda p, ids: plain.apply({"params": p}, ids).last_hidden_state
    per_token = flops.of_forward(forward, params, ids).total / (rows * length)
    return {"value": rows * length / median_seconds(functools.partial(run, params, ids), 10), "flops": per_token}


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second from an encoder-decoder, greedily or with beams, the source's reading included."""
    config, batch, new = config_of(spec), spec["batch"], spec["new"]
    model = config.make()
    params = fresh(model)
    sources = RNG.integers(1, config.vocab_size, (batch, spec["source"])).tolist()
    run: Callable[[], Any]
    if spec["beams"] == 1:
        generator = Generator(model, params)
        run = lambda: generator.advance(generator.start(sources, new, jax.random.key(0)), 2**30).tokens_BN
    else:
        search = BeamSearch(model, params, (), BeamConfig(spec["beams"]))
        run = lambda: search.search(sources, new)
    seconds = median_seconds(run, 3)
    decoder = {k: v for k, v in params.items() if not k.startswith("encoder")}
    cache = jax.eval_shape(lambda: config.init_cache(batch * spec["beams"], 1 + new))
    plain, rows = config.make(flops.PLAIN), batch * spec["beams"]
    call = lambda width: (jax.ShapeDtypeStruct((rows, width), np.int32), jax.ShapeDtypeStruct((rows, width), bool))
    read = lambda p, call: prefill.begin(plain, p, *call, 1 + new, "float32")[1]
    state = jax.eval_shape(read, params, call(spec["source"]))  # cross-attention's keys stand in it
    again = flops.of_forward(lambda p, call: prefill.go_on(plain, p, *call), params, (*call(1), state))
    return {
        "value": batch * new / seconds,
        "bytes_per_step": weights.bytes_of(decoder) + weights.bytes_of(cache),
        "flops_per_step": again.total,
    }


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of whole training steps (AdamW, clipping)."""
    config, (rows, length) = config_of(spec), spec["shape"]
    model, tx = config.make(), make_optimizer(OptimizerConfig(), 100)
    objective: Any = PermutationLM() if spec["family"] == "xlnet" else MaskedLM(pair=0.0, mask_id=4)
    objective = objective.for_run(1, config, 4)
    state = jax.jit(lambda key: init_state(fresh(model), tx, key))(jax.random.key(1))
    run = jax.jit(make_train_step(model, objective, tx, StepConfig(unroll=True)), donate_argnums=0)
    batch = {"input_ids": RNG.integers(0, config.vocab_size, (rows, length)).astype(np.int32)}

    def advance() -> Any:
        nonlocal state
        state, metrics = run(state, batch)
        return metrics

    return {"value": rows * length / median_seconds(advance, 5)}
