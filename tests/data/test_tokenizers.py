"""Tokenizers of every kind: exact round trips, save and load, merges replayed by brute force, errors in one line."""

import collections
import json
import random

import pytest
import tokenizers as backends
from tokenizers import models, pre_tokenizers

from llm_jax.data import chat, tokenizers
from llm_jax.data.tokenizers import END_OF_TEXT, Tokenizer, TokenizerError

TEXTS = ["the cat sat on the mat, the cat sat richly", "low lower lowest, new newer newest", "naïve café 😀\n"] * 8
SENTENCE = "the newest cat sat low"


@pytest.fixture(scope="module")
def trained():
    sizes = {"bpe": 300, "wordpiece": 80, "unigram": 60, "char": 1, "word": 40}
    return {kind: tokenizers.train(TEXTS, kind, size) for kind, size in sizes.items()}


def random_text(rng):
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x1F600, 0x1F650)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(1, 40)))


def test_bytes_survive_encode_and_decode(trained):
    rng = random.Random(0)
    texts = ["", " ", "\x00\x01\x7f\r\n\t", "a\u0301e\u200d\U0001f468\u200d\U0001f469", *TEXTS]
    texts += [random_text(rng) for _ in range(300)]
    tokenizer = trained["bpe"]
    size = tokenizer.vocab_size
    for text, batch in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == batch
        assert all(0 <= i < size for i in ids)


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_train_save_load(kind, trained, tmp_path):
    tokenizer = trained[kind]
    tokenizer = Tokenizer(tokenizer.backend, 3, [*tokenizer.eos_ids, 5], "{{ messages }}")
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizers.load(path)
        assert (again.bos_id, again.eos_ids, again.chat_template) == (3, (0, 5), "{{ messages }}")
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(SENTENCE) == tokenizer.encode(SENTENCE)
    ids = tokenizer.encode(SENTENCE)
    assert tokenizer.decode(ids) == SENTENCE
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == SENTENCE  # special tokens are left out
    assert tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False) == END_OF_TEXT
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_id]  # and recognised where written out
    unknown = {
        "bpe": "Ð ¶",
        "wordpiece": "[UNK]",
        "unigram": "▁ <unk>",
        "char": "<unk>",
        "word": "<unk>",
    }  # two bytes, or one entry
    assert " ".join(map(tokenizer.token, tokenizer.encode("ж"))) == unknown[kind]


def test_sizes(trained):
    assert trained["bpe"].vocab_size == 300
    assert trained["char"].vocab_size == len(set("".join(TEXTS))) + 2  # the separator and the unknown entry
    assert trained["char"].encode("ca\n") == [trained["char"].backend.token_to_id(c) for c in "ca\n"]
    added = Tokenizer(backends.Tokenizer.from_str(trained["bpe"].backend.to_str()))
    added.backend.add_tokens(["<extra>"])
    assert added.vocab_size == 301 and added.encode("<extra>") == [300]


def test_special_ids(trained, tmp_path):
    backend = trained["bpe"].backend
    plain = Tokenizer(backend)
    assert plain.eos_id is None and plain.special(None) == "" and plain.token(9999) == "<9999>"
    assert trained["bpe"].special(0) == END_OF_TEXT
    plain.save(tmp_path)
    rows = [
        ({}, None, None, (0,)),  # nothing said: the usual separator
        ({"eos_token": "a"}, None, None, (backend.token_to_id("a"),)),
        ({"eos_token": {"content": "b"}, "bos_token": {"content": "c"}}, None, backend.token_to_id("c"),
         (backend.token_to_id("b"),)),
        ({"eos_token": "a"}, {"eos_token_id": [0, 7, 0]}, None, (backend.token_to_id("a"), 0, 7)),
        ({}, {"eos_token_id": 9}, None, (9,)),
    ]  # fmt: skip
    for config, generation, bos, eos in rows:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        found = tokenizers.load(tmp_path)
        assert (found.bos_id, found.eos_ids) == (bos, eos), config


def test_templates_beside_and_by_name(trained, tmp_path, caplog):
    Tokenizer(trained["bpe"].backend).save(tmp_path)
    assert tokenizers.load(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert tokenizers.load(tmp_path).chat_template == "beside"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert tokenizers.load(tmp_path).chat_template == "beside"  # a file of its own is the newer place
    (tmp_path / "chat_template.jinja").unlink()
    found = tokenizers.load(tmp_path)
    assert (found.chat_template, found.tool_template) == ("yes", "no")
    found.save(tmp_path)
    found = tokenizers.load(tmp_path)
    assert (found.chat_template, found.tool_template) == ("yes", "no")
    assert [chat.render(found, [], tools=tools) for tools in (None, [])] == ["yes", "no"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"rag": "no"}}))
    assert tokenizers.load(tmp_path).chat_template is None and "of the chat templates rag none is the" in caplog.text


def test_errors_are_one_line(trained, tmp_path):
    trained["bpe"].save(tmp_path / "config")
    (tmp_path / "config" / "tokenizer_config.json").write_text("{")
    (tmp_path / "list").mkdir()
    trained["bpe"].save(tmp_path / "list")
    (tmp_path / "list" / "tokenizer_config.json").write_text("[]")
    (tmp_path / "tokenizer.json").write_text("{}")
    rows = [
        (lambda: tokenizers.load(tmp_path / "none"), "no tokenizer at"),
        (lambda: tokenizers.load(tmp_path), "is not a tokenizer.json"),
        (lambda: tokenizers.load(tmp_path / "config"), "tokenizer_config.json is not JSON"),
        (lambda: tokenizers.load(tmp_path / "list"), "holds no JSON object"),
        (lambda: tokenizers.train(TEXTS, "letters", 10), "not one of bpe, wordpiece, unigram, char, word"),
        (lambda: tokenizers.train(TEXTS, "bpe", 256), "below the 256 bytes and 1 special"),
        (lambda: tokenizers.train(TEXTS, "unigram", 4), "vocab_size=4 cannot be trained"),
        (lambda: tokenizers.replay_merges(trained["char"], {"a": 1}), "BPE only, this is WordLevel"),
    ]
    for call, message in rows:
        with pytest.raises(TokenizerError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def pairs(pieces, counts):
    """How often each pair of neighbours stands in the words, overlaps of equal letters counted as one merge."""
    out = collections.Counter()
    for word, cut in pieces.items():
        for pair in set(zip(cut, cut[1:], strict=False)):
            n = i = 0
            while i + 1 < len(cut):
                hit = (cut[i], cut[i + 1]) == pair
                n, i = n + hit, i + (2 if hit else 1)
            out[pair] += n * counts[word]
    return out


@pytest.mark.parametrize("words", [{"low": 5, "lower": 2, "newest": 6, "widest": 3}, {"aaaa": 3, "aab": 2, "café": 4}])
def test_replayed_merges_are_those_of_brute_force(words):
    corpus = [w for w, n in words.items() for _ in range(n)]
    tokenizer = tokenizers.train(corpus, "bpe", 257 + 8)
    history = tokenizers.replay_merges(tokenizer, words)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {w: tuple(to_bytes.pre_tokenize_str(w)[0][0]) for w in words}
    for step in history:
        counted = pairs(pieces, words)
        assert step.occurrences == counted[step.pair] == max(counted.values())  # BPE takes the most frequent pair
        merged = "".join(step.pair)
        for word, cut in step.words.items():
            assert "".join(cut) == "".join(pieces[word])
            assert merged in cut or cut == pieces[word]
        pieces = step.words
    assert len(history) == len(json.loads(tokenizer.backend.to_str())["model"]["merges"]) >= 7
    for word, cut in pieces.items():
        assert list(cut) == [tokenizer.token(i) for i in tokenizer.encode(word)]


def test_an_unseen_word_splits_into_known_pieces():
    """Open vocabulary: *richest*, never seen, is cut into the pieces of *richer* and *poorest*."""
    corpus = ["rich", "richer", "richly"] * 10 + ["poorest", "widest", "best", "est"] * 10
    tokenizer = tokenizers.train(corpus, "bpe", 257 + 30)
    history = tokenizers.replay_merges(tokenizer, {"richest": 1})
    assert history[-1].words == {"richest": ("rich", "est")}
    assert [tokenizer.token(i) for i in tokenizer.encode("richest")] == ["rich", "est"]
    words = backends.Tokenizer(models.WordLevel({"[UNK]": 0, "rich": 1, "richer": 2, "poorest": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert Tokenizer(words).encode("richest rich") == [0, 1]


def test_replay_needs_no_word_of_the_training_text():
    tokenizer = tokenizers.train(["low lower"], "bpe", 262)
    assert tokenizers.replay_merges(tokenizer, {"xyz": 2}) == []
