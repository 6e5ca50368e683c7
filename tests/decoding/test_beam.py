"""Beam search against the enumeration of every sequence, and its options."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, MODELS, model_params

from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.generate import Generator
from llm_jax.models.xlnet import XLNetConfig

V, T, END = 5, 4, 2
PROMPT = [3, 1, 4]
THREE = BeamConfig(beams=3, early_stopping="never")
# beams share what all layers do with a cache; two of them in one family
TINY = {
    "gpt2": dataclasses.replace(MODELS["gpt2"], vocab_size=V),
    "t5": dataclasses.replace(ENCODER_DECODERS["t5"], vocab_size=V, num_layers=1, num_decoder_layers=None),
    "xlnet": XLNetConfig(vocab_size=V, model_dim=12, num_layers=1, num_heads=3, hidden_dim=10),
}


@functools.cache
def params_of(name):
    return model_params(TINY[name], std=0.5)


@functools.cache
def every_sequence(name):
    """{tokens: log-probability} of all outputs of at most T tokens, END included."""
    config, params = TINY[name], params_of(name)
    model = config.make()
    whole = np.array(list(itertools.product(range(V), repeat=T)))
    if name == "t5":
        source = np.tile(PROMPT, (len(whole), 1))
        target = np.concatenate([np.full((len(whole), 1), config.start_id), whole[:, :-1]], axis=1)
        out = jax.jit(lambda p: model.apply({"params": p}, source, target).logits)(params)
    else:
        ids = np.concatenate([np.tile(PROMPT, (len(whole), 1)), whole[:, :-1]], axis=1)
        order = {"left_to_right": True} if name == "xlnet" else {}
        out = jax.jit(lambda p: model.apply({"params": p}, ids, **order).logits[:, len(PROMPT) - 1 :])(params)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(out)), whole[..., None], 2)[..., 0].astype(np.float64)
    found = {}
    for tokens, row in zip(whole.tolist(), logp, strict=True):
        n = tokens.index(END) + 1 if END in tokens else T
        found[tuple(tokens[:n])] = row[:n].sum()
    return found


def best(found, config, count):
    scores = {tokens: logp / config.divisor(len(tokens)) for tokens, logp in found.items()}
    return sorted(scores.items(), key=lambda x: -x[1])[:count]


@functools.cache
def searching(name, config):
    return BeamSearch(TINY[name].make(), params_of(name), (END,), config)


def found_by(name, config, count=1):
    return searching(name, config).search([PROMPT], T, count)[0]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("options", [{}, dict(penalty="gnmt", length_penalty=0.6), dict(length_penalty=-0.5)])
def test_the_widest_beam_finds_the_best_of_all(name, options):
    """As many beams as there are sequences, more than there are entries: nothing is lost."""
    config = BeamConfig(beams=V ** (T - 1), early_stopping="never", **options)
    everything = every_sequence(name)
    assert abs(sum(np.exp(x) for x in everything.values()) - 1) < 1e-5  # and these are all of them
    for hypothesis, (tokens, score) in zip(found_by(name, config, 6), best(everything, config, 6), strict=True):
        stopped = tokens[-1] == END
        assert tuple(hypothesis.tokens) == (tokens[:-1] if stopped else tokens)
        assert hypothesis.finish_reason == ("stop" if stopped else "length")
        np.testing.assert_allclose(hypothesis.score, score, rtol=1e-5)
        np.testing.assert_allclose(hypothesis.logprob, everything[tokens], rtol=1e-5)


def test_one_beam_is_greedy():
    name, prompts = "t5", [PROMPT, [1, 1, 3, 3, 0], [4]]
    model, params = TINY[name].make(), params_of(name)
    search = BeamSearch(model, params, (END,), BeamConfig(beams=1))
    greedy = Generator(model, params, (END,)).generate(prompts, T, jax.random.key(0))
    assert [row[0].tokens for row in search.search(prompts, T)] == [c.tokens for c in greedy]


def test_a_rows_outputs_do_not_depend_on_its_neighbours():
    """Ragged prompts, of a decoder too."""
    for name in TINY:
        together = searching(name, THREE).search([PROMPT, [1, 1, 3, 3, 0]], T, 3)
        assert [h.tokens for h in together[0]] == [h.tokens for h in found_by(name, THREE, 3)]


def test_options():
    forced = found_by("gpt2", BeamConfig(beams=3, first_token=4, last_token=END, min_new_tokens=2), 3)
    assert all(h.tokens[0] == 4 and len(h.tokens) >= 2 and h.finish_reason == "stop" for h in forced)
    banned = found_by("gpt2", BeamConfig(beams=3, banned=(0, 3)), 3)
    assert not {0, 3} & {t for h in banned for t in h.tokens}
    assert found_by("gpt2", THREE) == found_by("gpt2", THREE, 3)[:1]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: BeamConfig(beams=0), "beams=0 must be at least 1"),
        (lambda: BeamConfig(penalty="wu"), "penalty='wu' is not one of length, gnmt"),
        (lambda: BeamConfig(early_stopping="soon"), "early_stopping='soon' is not one of True, False"),
        (lambda: BeamConfig(min_new_tokens=-1), "min_new_tokens=-1 must not be negative"),
        (lambda: found_by("gpt2", BeamConfig(banned=(V,))), "token 5 lies outside of the vocabulary of 5"),
        (lambda: found_by("gpt2", BeamConfig(beams=2), 3), r"num_return=3 must lie in 1..beams=2"),
        (lambda: found_by("gpt2", BeamConfig(min_new_tokens=5)), "max_new_tokens=4 must be at least 1 and"),
        (
            lambda: BeamSearch(TINY["t5"].make(), params_of("t5")).search([PROMPT], 64),
            "the start token and output of 65 tokens exceed the context of 16: lower max_new_tokens$",
        ),
        (
            lambda: BeamSearch(dataclasses.replace(TINY["t5"], decoder=False).make(), params_of("t5")),
            "this T5 is an encoder alone and cannot generate",
        ),
        (
            lambda: BeamSearch(dataclasses.replace(TINY["t5"], head="span").make(), params_of("t5")),
            "this T5 has head='span' and cannot generate: load it with head='lm'",
        ),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
