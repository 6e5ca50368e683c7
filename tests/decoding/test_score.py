"""The probability of a text in every family, against passes over its beginnings."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, model_params

from llm_jax.data import tokenizers
from llm_jax.data.characters import character_ids
from llm_jax.decoding import fill_mask, score
from llm_jax.decoding.score import of_text
from llm_jax.models.elmo import ElmoConfig
from llm_jax.models.xlnet import XLNetConfig

TEXT = "the cat saw"  # a program for every beginning of it
ELMO = ElmoConfig(
    vocab_size=V, max_characters=6, character_dim=3, widths=(1, 2), filters=(3, 4), num_highways=1, model_dim=12,
    hidden_dim=8, dropout=0.0,
)  # fmt: skip
CONFIGS = {
    "gpt": MODELS["gpt2"],
    "xlnet": XLNetConfig(vocab_size=V, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10),
    "t5": ENCODER_DECODERS["t5"],
    "bert": ENCODERS["roberta"],
    "elmo": ELMO,
}


@functools.cache
def words(masked):
    special = tokenizers.MASKED_SPECIAL if masked else (tokenizers.END_OF_TEXT,)
    return tokenizers.train([TEXT, "a dog saw the cat"], "word", V, special)


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(config, params, args, more):
    out = config.make().apply({"params": params}, *args, **more)
    if config is ELMO:
        halves = np.split(np.arange(24), 2)
        return [jax.nn.log_softmax(out.head.logits(out.last_hidden_state[..., h])) for h in halves]
    return jax.nn.log_softmax(out.logits)


def by_hand(name, tokenizer):
    """Every token's log-probability by a pass over nothing but what it is given."""
    config, ids = CONFIGS[name], tokenizer.encode(TEXT)
    params, end = model_params(CONFIGS[name]), tokenizer.separator
    run = lambda *args, **more: _log_softmax(config, params, [np.asarray([a]) for a in args], more)
    found = []
    for i, own in enumerate(ids):
        if name == "gpt":
            found.append(run([end, *ids[:i]])[0, -1, own])
        elif name == "xlnet":  # the last position predicts itself, unseen
            length = i + 2
            order = dict(perm_mask=np.triu(np.ones((1, length, length))), target_positions=np.array([[i + 1]]))
            found.append(run([end, *ids[:i], 0], **order)[0, 0, own])
        elif name == "t5":
            found.append(run([*tokenizer.encode("a dog"), end], [config.start_id, *ids[:i]])[0, -1, own])
        elif name == "bert":
            mask = [*ids[:i], tokenizer.role("mask"), *ids[i + 1 :]]
            found.append(run([tokenizer.role("cls"), *mask, tokenizer.role("sep")])[0, i + 1, own])
        else:
            spell = lambda seen: np.stack([character_ids(tokenizer.token(t), 6) for t in seen])
            forward, _ = run(spell([end, *ids[:i]]))
            _, backward = run(spell([*ids[i + 1 :], end]))
            found.append((forward[0, -1, own] + backward[0, 0, own]) / 2)
    if name == "t5":
        found.append(run([*tokenizer.encode("a dog"), end], [config.start_id, *ids])[0, -1, end])
    return np.asarray(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_is_the_product_of_its_tokens(name):
    tokenizer = words(name == "bert")
    text = f"a dog ||| {TEXT}" if name == "t5" else TEXT
    found = of_text(CONFIGS[name].make(), model_params(CONFIGS[name]), tokenizer, text)
    np.testing.assert_allclose(found, by_hand(name, tokenizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, text, words_",
    [
        ("gpt", "", "has too few tokens"),
        ("elmo", "", "has too few tokens"),
        ("bert", "", "has too few tokens"),
        ("t5", "a dog", "is not of the form 'SOURCE"),
    ],
)
def test_what_says_nothing(name, text, words_):
    with pytest.raises(ValueError, match=words_):
        of_text(CONFIGS[name].make(), model_params(CONFIGS[name]), words(name == "bert"), text)


@pytest.mark.parametrize("name, program", [("gpt", score.sequence_logprobs), ("bert", fill_mask._log_softmax)])
def test_texts_of_like_lengths_share_a_program(name, program):
    tokenizer, params = words(name == "bert"), model_params(CONFIGS[name])
    count = lambda: [of_text(CONFIGS[name].make(), params, tokenizer, "the " * n) for n in (2, 3, 5)]
    before = program._cache_size()
    found = count()
    assert program._cache_size() <= before + 1 and [len(x) for x in found] == [2, 3, 5]
