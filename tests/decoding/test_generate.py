"""Generation equals a plain loop without a cache: ragged, limited, stopped, penalised, windowed, streamed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import noise

from llm_jax.decoding.generate import Completion, Generator
from llm_jax.decoding.prefill import bucket
from llm_jax.decoding.sampling import SamplingConfig
from llm_jax.decoding.score import sequence_logprobs
from llm_jax.models.gpt import GPTConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.models.xlnet import XLNetConfig

V, LENGTH = 19, 40
LLAMA = LlamaConfig(vocab_size=V, context_length=LENGTH, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                    hidden_dim=24, vocab_pad_multiple=8, rope_theta=100.0)  # fmt: skip
GPT = GPTConfig(vocab_size=V, context_length=LENGTH, model_dim=16, num_layers=2, num_heads=2, tied=False)
XLNET = XLNetConfig(vocab_size=V, context_length=LENGTH, model_dim=16, num_layers=2, num_heads=2, hidden_dim=24)
PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]
KEY = jax.random.key(0)


@functools.cache
def made(config):
    model = config.make()
    std, seed = (2.0, 2) if isinstance(config, XLNetConfig) else (0.7, 1)
    return model, noise(model, std, seed)  # large: the next token is not always the same


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    order = {"left_to_right": True} if isinstance(model.config, XLNetConfig) else {}
    return model.apply({"params": params}, ids, **order).logits


def next_logits(config, seen):
    """Of the next token, by a pass over everything seen, without a cache."""
    model, params = made(config)
    ids = np.zeros((1, model.config.context_length), np.int32)
    ids[0, : len(seen)] = seen
    return np.asarray(forward(model, params, ids))[0, len(seen) - 1, :V].astype(np.float64)


def loop(config, prompt, count, stop=(), change=lambda logits, seen, new: logits, view=lambda seen: seen):
    """Greedy tokens and their log-probabilities, one pass each."""
    seen, new, logprobs = list(prompt), [], []
    for _ in range(count):
        logits = next_logits(config, view(seen))
        token = int(np.argmax(change(logits.copy(), seen, new)))
        if token in stop:
            return new, logprobs, "stop"
        new.append(token)
        seen.append(token)
        logprobs.append(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return new, logprobs, "length"


def same(found: Completion, want):
    tokens, logprobs, reason = want
    assert found.tokens == tokens and found.finish_reason == reason
    np.testing.assert_allclose(found.logprobs, logprobs, rtol=1e-5, atol=1e-5)


@functools.cache
def generator(config, stop=(), sampling=SamplingConfig()):
    return Generator(*made(config), stop, sampling)


def letters(ids):
    return "".join(chr(ord("a") + i) for i in ids)


@pytest.mark.parametrize("config", [LLAMA, GPT, XLNET], ids=["llama", "gpt", "xlnet"])
def test_ragged_rows_equal_the_loop_and_each_row_alone(config):
    g = generator(config)
    limits = [9, 12, 5]
    found = g.generate(PROMPTS, limits, KEY)
    for prompt, limit, row in zip(PROMPTS, limits, found, strict=True):
        same(row, loop(config, prompt, limit))
    assert len({tuple(r.tokens[:5]) for r in found}) > 1
    (alone,) = g.generate([PROMPTS[1]], limits[1], KEY)
    assert alone.tokens == found[1].tokens
    np.testing.assert_allclose(alone.logprobs, found[1].logprobs, rtol=1e-5, atol=1e-5)


def test_no_tokens_asked_for():
    last, first, none = generator(LLAMA).generate(PROMPTS, [1, 12, 0], KEY)
    assert none == Completion([], [], "length") and (len(first.tokens), len(last.tokens)) == (12, 1)


def test_stop_tokens():
    want = [loop(LLAMA, p, 12) for p in PROMPTS]
    stop = (want[0][0][4], want[1][0][2])
    g = generator(LLAMA, stop)
    found = g.generate(PROMPTS, 12, KEY)
    for prompt, row in zip(PROMPTS, found, strict=True):
        same(row, loop(LLAMA, prompt, 12, stop))
    assert "stop" in {r.finish_reason for r in found}
    assert all(s not in r.tokens for r in found for s in stop)


def test_stop_strings():
    g = generator(LLAMA)
    plain = g.generate(PROMPTS, 12, KEY)
    texts = [letters(r.tokens) for r in plain]
    stops = (texts[0][3:5], texts[1][8:11])
    for chunk in (1, 5, 16):
        found = g.generate(PROMPTS, 12, KEY, stop_strings=stops, decode=letters, chunk=chunk)
        for row, before, text in zip(found, plain, texts, strict=True):
            ends = [text.index(s) + len(s) for s in stops if s in text]
            end = min(ends, default=12)
            assert row.tokens == before.tokens[:end] and row.logprobs == before.logprobs[:end]
            assert row.finish_reason == ("stop_string" if ends else "length")
    assert {r.finish_reason for r in found} >= {"stop_string"}


def test_logprobs_are_those_of_the_sequence():
    model, params = made(LLAMA)
    found = generator(LLAMA).generate(PROMPTS, 12, KEY)
    ids, mask = np.zeros((3, 20), np.int32), np.zeros((3, 20), bool)
    for row, (prompt, done) in enumerate(zip(PROMPTS, found, strict=True)):
        whole = prompt + done.tokens
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, True
    logp = np.asarray(sequence_logprobs(model, params, ids, mask))
    assert logp.shape == (3, 19) and not logp[~mask[:, 1:]].any()
    for row, (prompt, done) in enumerate(zip(PROMPTS, found, strict=True)):
        mine = logp[row, len(prompt) - 1 :][: len(done.tokens)]
        np.testing.assert_allclose(done.logprobs, mine, rtol=1e-5, atol=1e-5)


def test_penalties_and_blocked_ngrams_count_prompt_and_output():
    config = SamplingConfig(
        repetition_penalty=1.4, presence_penalty=0.8, frequency_penalty=0.3, no_repeat_ngram=2, temperature=0.0
    )

    def change(logits, seen, new):
        for v in set(seen):
            logits[v] = logits[v] / 1.4 if logits[v] > 0 else logits[v] * 1.4
        grams = set(zip(seen, seen[1:], strict=False))
        for v in range(V):
            if (seen[-1], v) in grams:
                logits[v] = -np.inf
            logits[v] -= 0.8 * (v in new) + 0.3 * new.count(v)
        return logits

    found = generator(LLAMA, (), config).generate(PROMPTS, 12, KEY)
    for prompt, row in zip(PROMPTS, found, strict=True):
        same(row, loop(LLAMA, prompt, 12, change=change))  # log-probabilities are the model's own
    assert [r.tokens for r in found] != [r.tokens for r in generator(LLAMA).generate(PROMPTS, 12, KEY)]


def test_sampled_text_belongs_to_its_key():
    g = generator(LLAMA, (), SamplingConfig(1.0))
    first = g.generate(PROMPTS, 12, KEY)
    assert first == g.generate(PROMPTS, 12, KEY)
    assert g.generate([PROMPTS[0], *PROMPTS[:0:-1]], 12, KEY)[0] == first[0]  # whatever stands beside it
    other = [g.generate(PROMPTS, 12, jax.random.key(i))[0].tokens for i in range(1, 5)]
    assert len({tuple(t) for t in [first[0].tokens, *other]}) == 5
    equal = g.generate([PROMPTS[1]] * 3, 12, KEY)
    assert len({tuple(r.tokens) for r in equal}) == 3  # equal prompts, each row its own key


def test_one_compilation_a_bucket():
    g = Generator(*made(LLAMA))
    count = lambda: (g._start._cache_size(), g._advance._cache_size())
    for prompt, new in [([1], 3), ([1] * 9, 7), ([1] * 16, 1), ([2, 3], 14)]:
        g.generate([prompt], new, KEY)
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert count() == (2, 2)  # caches of 16 and of 32 slots
    g.generate([[5] * 3], 11, jax.random.key(3))
    assert count() == (2, 2)


def test_a_window_of_one_layer_equals_recomputing_the_last_window():
    """One rotary layer: what has left the window is gone, and only distances count."""
    config = dataclasses.replace(LLAMA, num_layers=1, context_length=16)
    g = generator(config)
    prompt = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    (found,) = g.generate([prompt], 24, KEY, window=True)
    same(found, loop(config, prompt, 24, view=lambda seen: seen[-16:]))


def test_a_window_equals_sliding_window_attention():
    config = dataclasses.replace(LLAMA, context_length=16)
    wide = dataclasses.replace(LLAMA, window=16)  # the same weights, windowed attention over a long sequence
    (found,) = generator(config).generate([PROMPTS[1]], 30, KEY, window=True)
    same(found, loop(wide, PROMPTS[1], 30))


@pytest.mark.parametrize("stops", [(), ("first",)], ids=["whole", "stopped"])
def test_the_stream_joins_to_the_generated_text(stops):
    g = generator(LLAMA)

    def decode(ids):  # a letter a token, and half a character behind every odd number of them
        return letters(ids) + "\ufffd" * (len(ids) % 2)

    (done,) = g.generate([PROMPTS[1]], 12, KEY)
    whole = decode(done.tokens)
    stops = (whole[5:8],) if stops else ()
    pieces = list(g.stream(PROMPTS[1], 12, KEY, decode, stop_strings=stops))
    assert "".join(pieces) == (whole.partition(stops[0])[0] if stops else whole)
    assert len(pieces) > 2 and not any("\ufffd" in p for p in pieces)
    assert "".join(g.stream(PROMPTS[1], 12, KEY, decode, stop_strings=stops, chunk=5)) == "".join(pieces)


def test_the_stream_continues_its_prompt():
    """What stands between the prompt and the first new token belongs to the text; an answer is a text of its own."""
    g, prompt = generator(LLAMA), PROMPTS[1]
    words = lambda ids: " ".join(f"w{i}" for i in ids)
    (done,) = g.generate([prompt], 12, KEY)
    joined = "".join(g.stream(prompt, 12, KEY, words))
    assert words(prompt) + joined == words([*prompt, *done.tokens])
    assert "".join(g.stream(prompt, 12, KEY, words, alone=True)) == words(done.tokens)
    first = f" w{done.tokens[0]}"
    assert list(g.stream(prompt, 12, KEY, words, stop_strings=[first])) == []
    (stopped,) = g.generate([prompt], 12, KEY, stop_strings=[first], decode=words)
    assert (stopped.tokens, stopped.finish_reason) == (done.tokens[:1], "stop_string")


ERRORS = [
    (LLAMA, ([], 3), "a prompt is empty"),
    (LLAMA, ([[1], []], 3), "a prompt is empty"),
    (LLAMA, ([[1], [2]], [3]), "1 limits for 2 prompts"),
    (LLAMA, ([[1] * 41], 1), "the prompt of 41 tokens is longer than the context of 40"),
    (LLAMA, ([[1] * 30, [1]], [11, 1]), "prompt and output of 41 tokens exceed the context of 40: lower"),
    (GPT, ([[1] * 30], 11, KEY, True), "learned positions"),
]


@pytest.mark.parametrize("config, arguments, message", ERRORS)
def test_errors(config, arguments, message):
    with pytest.raises(ValueError) as error:
        generator(config).generate(*arguments, *(() if len(arguments) > 2 else (KEY,)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_head_with_labels_generates_nothing():
    for config in (dataclasses.replace(GPT, head="tokens"), dataclasses.replace(LLAMA, head="classification")):
        with pytest.raises(ValueError, match=f"has head='{config.head}' and cannot generate: load it with head='lm'"):
            generator(config)


def test_stop_strings_need_a_decoder():
    with pytest.raises(ValueError, match="stop_strings need decode"):
        generator(LLAMA).generate([[1]], 3, KEY, stop_strings=["a"])
