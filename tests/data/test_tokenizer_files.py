"""What stands beside a vocabulary: stop tokens from every place, further entries, and vocabularies alone."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from llm_jax.data import tokenizers
from llm_jax.data.tokenizer import Rule
from llm_jax.data.tokenizers import TokenizerError

WORDS = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<eot>", "<pad>", "hello", "world", "<", ">", "x"])}


def write(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def folder(tmp_path):
    backend = Backend(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


STOPS = [  # files -> stop ids, the tokenizer's own first
    (dict(config={"eos_token_id": 2}), (2,)),
    (dict(config={"eos_token_id": [3, 2]}), (3, 2)),
    (dict(special_tokens_map={"eos_token": "</s>"}), (2,)),
    (dict(special_tokens_map={"eos_token": {"content": "</s>"}}, config={"eos_token_id": 3}), (2, 3)),
    (dict(tokenizer_config={"eos_token": ""}, config={"eos_token_id": 2}), (2,)),
    (dict(tokenizer_config={"eos_token": "", "bos_token": ""}, special_tokens_map={"eos_token": "</s>"}), (2,)),
    (dict(generation_config={"eos_token_id": [3]}, config={"eos_token_id": [2, 3]}), (3, 2)),
    (dict(tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": 3}), (2, 3)),
    (
        dict(
            tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": {}},
            special_tokens_map={"eos_token": "<eot>"},
            generation_config={"eos_token_id": 6},
            config={"eos_token_id": 5},
        ),
        (2, 3, 6, 5),
    ),
    (dict(config={"eos_token_id": None}), ()),
    (dict(config={"eos_token_id": -1}), ()),
    (dict(config={"eos_token_id": [50256, 2]}), (2, 50256)),  # an id without an entry stops, and separates nothing
]


@pytest.mark.parametrize("files, want", STOPS)
def test_stop_tokens_come_from_every_place(files, want, folder):
    assert tokenizers.load(write(folder, **files)).eos_ids == want


@pytest.mark.parametrize("value", ["</s>", [2, None, "3"], True, 2.0])
def test_a_stop_token_that_is_no_id_is_named(value, folder):
    with pytest.raises(TokenizerError, match="config.json: eos_token_id=.* neither an id nor a list"):
        tokenizers.load(write(folder, config={"eos_token_id": value}))


OBJECT = {"content": "<y>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
BESIDE = [  # files -> ids of "hello<x>world<y>"
    ({}, [5, 7, 9, 8, 6, 7, 0, 8]),
    (dict(added_tokens={"<y>": 11, "<x>": 10}), [5, 10, 6, 11]),
    (dict(tokenizer_config={"added_tokens_decoder": {"11": OBJECT, "10": {**OBJECT, "content": "<x>"}}}),
     [5, 10, 6, 11]),
    (dict(tokenizer_config={"pad_token": "<y>", "unk_token": {"content": "<x>"}}), [5, 10, 6, 11]),  # unk before pad
    (dict(tokenizer_config={"additional_special_tokens": ["<y>", "<x>"]}), [5, 11, 6, 10]),
    (dict(tokenizer_config={"image_token": "<y>", "pad_token": "<x>"}), [5, 10, 6, 11]),
    (dict(special_tokens_map={"pad_token": "<x>", "additional_special_tokens": ["<y>"]}), [5, 10, 6, 11]),
    (dict(tokenizer_config={"added_tokens_decoder": {"10": OBJECT}}, special_tokens_map={"pad_token": "<x>"}),
     [5, 7, 9, 8, 6, 10]),
]  # fmt: skip


@pytest.mark.parametrize("files, want", BESIDE)
def test_entries_beside_the_vocabulary(files, want, folder):
    tokenizer = tokenizers.load(write(folder, **files))
    assert tokenizer.encode("hello<x>world<y>") == want and tokenizer.vocab_size == max(*want, 9) + 1
    tokenizer.save(folder)  # and now they stand in tokenizer.json
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizers.load(folder).encode("hello<x>world<y>") == want


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(tokenizer_config={"eos_token": ["</s>"]}), r"eos_token=\['</s>'\] is not a token"),
        (dict(tokenizer_config={"added_tokens_decoder": {"10": "<x>"}}), "added_tokens_decoder has '10': '<x>'"),
        (dict(tokenizer_config={"added_tokens_decoder": {"ten": OBJECT}}), "added_tokens_decoder has 'ten'"),
        (dict(tokenizer_config={"chat_template": 3}), "chat_template=3 is not text"),
        (dict(tokenizer_config={"additional_special_tokens": "<x>"}), "additional_special_tokens='<x>' must be a list"),
        (dict(tokenizer_config={"eos_token_ids": ["x"]}), r"eos_token_id=\['x'\] is neither an id nor a list"),
        (dict(added_tokens={"<x>": "10"}), "added_tokens.json: '<x>' has the id '10'"),
    ],
)
def test_what_is_no_token_is_named(files, message, folder):
    with pytest.raises(TokenizerError, match=message):
        tokenizers.load(write(folder, **files))


def test_an_entry_with_another_id_than_said_is_told(folder, caplog):
    tokenizers.load(write(folder, added_tokens={"<x>": 12}))
    assert "gives '<x>' the id 12; the next free one is 10" in caplog.text


BYTES = {"h": 0, "e": 1, "l": 2, "o": 3, "he": 4, "ll": 5, "\u0120": 6, "<s>": 7, "</s>": 8, "<|endoftext|>": 9}
MERGES = "#version: 0.2\nh e\nl l\n"
LIST = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nHe\nhe\n##llo\ncafe\n\u6771\n"
ALONE = [  # vocabulary, settings, text -> ids with the rule, the rule
    ("gpt2", {}, "hello<|endoftext|> h<s>", [4, 5, 3, 9, 6, 0], Rule()),  # which names no <s>
    ("gpt2", {"add_bos_token": True}, "hello", [9, 4, 5, 3], Rule((9,))),
    (
        "gpt2",
        {"bos_token": "<s>", "add_bos_token": True, "add_prefix_space": True},
        "hello",
        [7, 6, 4, 5, 3],
        Rule((7,)),
    ),
    ("roberta", {}, "hello</s>he", [7, 4, 5, 3, 8, 4, 8], Rule((7,), (8,))),
    ("qwen2", {}, "hello", [4, 5, 3], Rule()),
    ("bert", {}, "Hello caf\u00e9 \u6771\u6771", [2, 6, 7, 8, 9, 9, 3], Rule((2,), (3,))),
    ("bert", {"do_lower_case": False}, "Hello hello", [2, 5, 7, 6, 7, 3], Rule((2,), (3,))),
    ("bert", {"strip_accents": False}, "caf\u00e9 cafe", [2, 1, 8, 3], Rule((2,), (3,))),
    ("bert", {"tokenize_chinese_chars": False}, "\u6771\u6771 \u6771", [2, 1, 9, 3], Rule((2,), (3,))),
]


@pytest.mark.parametrize("kind, settings, text, ids, rule", ALONE)
def test_vocabularies_alone(kind, settings, text, ids, rule, tmp_path):
    assert not tokenizers.exists(tmp_path)
    write(tmp_path, config={"model_type": kind}, tokenizer_config=settings)
    if kind == "bert":
        (tmp_path / "vocab.txt").write_text(LIST)
    else:
        write(tmp_path, vocab=BYTES)
        (tmp_path / "merges.txt").write_text(MERGES)
    assert tokenizers.exists(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.rule == rule
    assert tokenizer.encode_texts([text])[0] == ids
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).encode_texts([text])[0] == ids


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "vocab.json and merges.txt and no tokenizer.json, which may be of any family"),
        ({"config": {"model_type": "bert"}}, "which may be of any family: name it"),
        ({"tokenizer_config": {"tokenizer_class": "CTRLTokenizer"}}, "there are GPT2Tokenizer, RobertaTokenizer"),
        ({"config": {"model_type": "gpt2"}, "vocab": {"h": 0}}, "cannot be read"),
        ({"config": {"model_type": "gpt2"}, "merges": "h i\nhi\n"}, "merges.txt:2 is not a pair of entries: 'hi'"),
    ],
)
def test_a_vocabulary_of_no_known_family_is_refused(files, message, tmp_path):
    files = {"vocab": BYTES, "merges": MERGES, **files}
    (tmp_path / "merges.txt").write_text(files.pop("merges"))
    write(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message) as error:
        tokenizers.load(tmp_path)
    assert isinstance(error.value, tokenizers.FamilyError) == ("cannot be read" not in str(error.value))
