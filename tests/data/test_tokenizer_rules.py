"""What stands around a text: the same in training rows, prompts and likelihoods, and again after saving."""

import json

import numpy as np
import pytest
from tokenizers import processors

from llm_jax.data import tokenizers, tokens
from llm_jax.data.corpora import BadRows, Document
from llm_jax.data.rows.pairs import encode_pairs
from llm_jax.data.tokenizer import Rule, set_rule
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.decoding import prefill

TEXTS = ["the cat sat", "on the mat"]
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
RULES = {
    "nothing": Rule(),
    "begin": Rule((1,)),
    "two": Rule((1, 2)),
    "both ends": Rule((1,), (0,)),
    "end": Rule((), (0,)),
}


@pytest.fixture(scope="module")
def backend():
    return tokenizers.train(TEXTS * 9, "bpe", 280, (tokenizers.END_OF_TEXT, "<s>", "a:b")).backend


def made(backend, rule):
    again = type(backend).from_str(backend.to_str())
    set_rule(again, rule)
    return Tokenizer(again, 2, [0])


@pytest.mark.parametrize("name", RULES)
def test_training_rows_prompts_and_likelihoods_agree(name, backend):
    rule, tokenizer = RULES[name], made(backend, RULES[name])
    assert tokenizer.rule == rule and tokenizer.bos_id == 2  # which entry templates mean is another question
    bare = [tokenizer.encode(text) for text in TEXTS]
    rows = [example.ids for example in tokens.plain_text(tokenizer)(DOCUMENTS, BadRows())]
    assert rows == [[*rule.begin, *ids, 0] for ids in bare]  # one separator, whoever puts it there
    assert tokenizer.encode_texts(TEXTS) == [[*rule.begin, *ids, *rule.end] for ids in bare]
    assert [tokenizer.encode_prompt(text) for text in TEXTS] == [[*rule.begin, *ids] for ids in bare]
    before = prefill.beginning(tokenizer)
    stream = [*rows[0], *rows[1]]
    place = len(stream) - 1 - len(bare[1])
    assert before and stream[place - len(before) : place] == before  # what a text's first token is predicted from
    framed_later = tokens.plain_text(tokenizer, framed=False)(DOCUMENTS, BadRows())
    assert [example.ids for example in framed_later] == [[*ids, 0] for ids in bare]


def test_a_rule_keeps_the_offsets_of_bytes(backend):
    """Offsets of a piece leave out the blank before it, where a byte-level post-processor says so."""
    plain = made(backend, Rule()).backend
    plain.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    want = plain.encode("the cat").offsets
    for rule in (Rule((1,), (0,)), Rule((1,))):
        set_rule(plain, rule)
        assert plain.encode("the cat").offsets == [(0, 0), *want, *[(0, 0)] * len(rule.end)]
    assert want != made(backend, Rule()).backend.encode("the cat").offsets


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_saved(name, backend, tmp_path):
    tokenizer = made(backend, RULES[name])
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert (again.rule, again.bos_id, again.eos_ids) == (RULES[name], 2, (0,))
    assert again.encode_texts(TEXTS) == tokenizer.encode_texts(TEXTS)
    set_rule(again.backend, Rule((2,)))
    assert again.rule == Rule((2,)) and again.encode_texts(["the"]) == [[2, *again.encode("the")]]


def test_older_runs_keep_their_begin_token(backend, tmp_path):
    """Before rules were saved, `bos_token` alone said what stands in front."""
    made(backend, Rule()).save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("add_bos_token") is False and tokenizers.load(tmp_path).rule == Rule()
    file.write_text(json.dumps(settings))
    assert tokenizers.load(tmp_path).rule == Rule((2,))
    del settings["eos_token_ids"]  # a folder of somebody else
    file.write_text(json.dumps(settings))
    assert tokenizers.load(tmp_path).rule == Rule()


def test_a_cache_belongs_to_its_rule(backend, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    build = lambda name, **how: tokens.build(
        str(tmp_path / "text.txt"), made(backend, RULES[name]), tmp_path / "cache", **how
    )["train"].ids.tolist()
    bare = made(backend, Rule()).encode(TEXTS[0])
    for name in ("nothing", "begin", "both ends"):
        assert build(name, framed=True) == [*RULES[name].begin, *bare, 0]
        assert build(name, framed=False) == [*bare, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 5  # without a rule both are the same


@pytest.mark.parametrize("name", RULES)
def test_pairs_are_learned_as_sources_are_read(name, backend):
    tokenizer = made(backend, RULES[name])
    pair = Document("0", "", {"a": TEXTS[0], "b": TEXTS[1]})
    (example,) = encode_pairs(tokenizer, ("a", "b"))([pair], BadRows())
    source, target = map(tokenizer.encode_source, TEXTS)
    assert source == [*RULES[name].begin, *tokenizer.encode(TEXTS[0]), 0]
    assert example.ids == [*source, *target]
    np.testing.assert_array_equal(example.weights, [0] * len(source) + [1] * len(target))
