"""Streamed layers: the same numbers as resident ones, in a fraction of the memory."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from loading import peak_of_streaming
from tiny_models import BERT, ENCODER_DECODERS, GPT, LLAMA, noise

from llm_jax import interop
from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.generate import Generator
from llm_jax.interop import InteropError
from llm_jax.models.bert import BertConfig
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn.execution import Execution

SAME = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
IDS = np.array([[4, 8, 15, 16, 23], [3, 1, 4, 1, 5]], np.int32)
CONFIGS = {
    "gpt2": GPTConfig(**GPT),
    "llama": LlamaConfig(**LLAMA),
    "bert": BertConfig(**BERT, head="masked_lm", pooler=None),
    "albert": BertConfig(
        **BERT, embedding_dim=8, num_groups=1, activation="gelu_tanh", head="masked_lm", pooler=None
    ),
    "xlnet": XLNetConfig(vocab_size=31, context_length=16, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10),
    "t5": ENCODER_DECODERS["t5"],
    "marian": ENCODER_DECODERS["marian"],
}  # fmt: skip


def both(config, folder):
    """(resident, streamed) of the same file."""
    model = config.make()
    interop.save(folder, model, noise(model, 0.3))
    return interop.load(folder), interop.load(folder, stream=True)


def logits(loaded):
    ids = (IDS, IDS) if loaded.config.reads == "source" else (IDS,)
    return jax.jit(lambda params: loaded.model.apply({"params": params}, *ids).logits)(loaded.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_those_of_resident_layers(name, tmp_path):
    resident, streamed = both(CONFIGS[name], tmp_path)
    SAME(logits(streamed), logits(resident))
    layers = [x for x in jax.tree.leaves(streamed.params) if x.shape[1:] == (0,)]
    assert layers and all(x.size == 0 for x in layers)


def test_outside_of_jit_and_cast(tmp_path):
    _, streamed = both(CONFIGS["llama"], tmp_path)
    half, whole = (interop.load(tmp_path, dtype="bfloat16", stream=s) for s in (True, False))
    wide = CONFIGS["llama"].make()
    interop.save(tmp_path / "wide", wide, noise(wide, 0.3), dtype="float64")
    double = [interop.load(tmp_path / "wide", stream=s) for s in (True, False)]
    for a, b in ((half, whole), (streamed, interop.load(tmp_path)), double):
        got, want = a.model.apply({"params": a.params}, IDS).logits, logits(b)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=1e-2, atol=1e-2)


def test_generation_and_beams(tmp_path):
    resident, streamed = both(CONFIGS["llama"], tmp_path / "llama")
    prompts, key = [[5, 3], [7, 1, 2, 9]], jax.random.key(0)
    want, got = (Generator(x.model, x.params).generate(prompts, 6, key) for x in (resident, streamed))
    assert [c.tokens for c in got] == [c.tokens for c in want]
    resident, streamed = both(dataclasses.replace(CONFIGS["t5"], num_layers=1, num_decoder_layers=2), tmp_path / "t5")
    search = lambda x: BeamSearch(x.model, x.params, (), BeamConfig(3)).search(prompts, 5)
    want, got = (search(x) for x in (resident, streamed))
    assert [[h.tokens for h in row] for row in got] == [[h.tokens for h in row] for row in want]


def test_what_is_in_memory_is_a_few_layers(tmp_path):
    config = GPTConfig(vocab_size=31, context_length=16, model_dim=512, num_layers=24, num_heads=4)
    model = config.make()
    interop.save(tmp_path, model, noise(model, 0.1))
    layers, grown = peak_of_streaming(tmp_path)
    assert layers > 300e6
    assert grown < layers / 2, (layers, grown)


def test_what_cannot_stream(tmp_path):
    model = CONFIGS["gpt2"].make()
    params = noise(model, 0.3)
    interop.save_own(tmp_path / "own", model, params)
    with pytest.raises(InteropError, match="which cannot stream: experiments.convert"):
        interop.load(tmp_path / "own", stream=True)
    interop.save(tmp_path / "hf", model, params)
    place = lambda shapes, axes: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    for given in ({"place": place}, {"execution": Execution(stack_runner=lambda call: None)}):
        with pytest.raises(InteropError, match="stream=True is for one device"):
            interop.load(tmp_path / "hf", stream=True, **given)
