"""SentencePiece folders against the library itself: ids, texts, what surrounds them, round trips, one-line errors."""

import json
import random
import sys

import numpy as np
import pytest
import tokenizers as backends
from pieces import CODED, HARD, SPIECE, TEXTS, VARIED, marian_folder, spiece_folder
from tokenizers import models, pre_tokenizers

from llm_jax.data import tokenizers, tokens
from llm_jax.data.corpora import BadRows, Document
from llm_jax.data.rows import pairs
from llm_jax.data.rows.masked import Frames
from llm_jax.data.sentencepiece import _shortened
from llm_jax.data.tokenizers import TokenizerError

RNG = random.Random(0)
PLANES = [(0x20, 0x7F)] * 3 + [(0x80, 0x370), (0x1EA0, 0x1EFF), (0xFF00, 0xFFEF), (0x2000, 0x2070), (0x1F600, 0x1F650)]
SCRIPTS = [(0, 0x20), (0x0900, 0x0980), (0x3040, 0x30FF), (0xAC00, 0xD7A3)]
RANDOM = [
    "".join(chr(RNG.randrange(*RNG.choice(PLANES + SCRIPTS))) for _ in range(RNG.randrange(1, 30))) for _ in range(400)
]
LINES = [line for line in TEXTS["fr"].splitlines() if line.strip()]
MARKED = ("</s>", "<unk>", "<pad>", "<extra_id_3>")  # found in a text before it is cut


@pytest.mark.parametrize("name", [name for name in SPIECE if name.startswith("t5")])
def test_t5_is_the_library_with_an_end_and_sentinels(name, tmp_path):
    theirs = spiece_folder(tmp_path, name)
    tokenizer = tokenizers.load(tmp_path)
    size = theirs.get_piece_size()
    assert tokenizer.eos_ids == (1,) and tokenizer.vocab_size == size + 100 and tokenizer.bos_id is None
    for text in [*VARIED, *HARD, *RANDOM, *LINES]:
        if any(mark in text for mark in MARKED):
            continue
        want = theirs.encode(text)
        assert tokenizer.encode(text) == want and tokenizer.encode_source(text) == [*want, 1], ascii(text)
        if 2 not in want:  # which is left out, and the library spells
            assert tokenizer.decode([*want, 1]) == theirs.decode(want), ascii(text)
    assert tokenizer.encode_batch(LINES) == theirs.encode(LINES)
    sentinel = tokenizer.encode("<extra_id_0>")
    assert sentinel == [size + 99] and tokenizer.encode("<extra_id_99>") == [size]
    ids = tokenizer.encode("the usage<extra_id_0> the</s>")
    assert ids == [*theirs.encode("the usage"), *sentinel, *theirs.encode("the"), 1]
    assert tokenizer.decode(ids) == "the usage the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the usage<extra_id_0> the</s>"
    if name == "t5_bytes":
        assert tokenizer.decode(tokenizer.encode("日本語 😀")) == "日本語 😀"


def test_sources_and_targets_of_marian_have_their_models_and_one_vocabulary(tmp_path):
    (source, target), vocab = marian_folder(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.role("pad"), tokenizer.vocab_size) == ((0,), len(vocab) - 1, len(vocab))
    assert tokenizer.target is not tokenizer and tokenizer.target.target is tokenizer.target
    differ, unknown = 0, 0
    for text in [*VARIED, *HARD, *RANDOM, *LINES]:
        if any(mark in text for mark in MARKED) or text.startswith(">>"):
            continue
        both = [m.encode(text, out_type=str) for m in (source, target)]
        ids = [[*(vocab.get(piece, 1) for piece in pieces), 0] for pieces in both]
        assert [tokenizer.encode_source(text), tokenizer.target.encode_source(text)] == ids, ascii(text)
        differ, unknown = differ + (ids[0] != ids[1]), unknown + (1 in ids[0])
        if 1 not in ids[1]:
            assert tokenizer.decode(ids[1]) == tokenizer.target.decode(ids[1]) == target.decode(both[1]).strip()
    assert differ > 100 and unknown > 100
    only = next(p for p in vocab if p[:1] == "\u2581" and p[1:].isalpha() and target.piece_to_id(p) == target.unk_id())
    assert tokenizer.decode([vocab[only], 0]) == only[1:]  # a piece that the target's model lacks
    codes = {">>fra<<": [vocab[">>fra<<"]], ">>xx<<": [1], "": []}
    for text in CODED[:5]:
        code = next(c for c in codes if text.startswith(c))
        rest = [vocab.get(piece, 1) for piece in source.encode(text[len(code) :], out_type=str)]
        assert tokenizer.encode(text) == codes[code] + rest, text


def test_targets_of_pairs_are_encoded_as_targets(tmp_path):
    marian_folder(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    record = {"en": LINES[3], "fr": LINES[4]}
    encode = pairs.encode_pairs(tokenizer, ("en", "fr"))
    (example,) = encode([Document(LINES[3], "row", record)], BadRows())
    a, b = tokenizer.encode_source(LINES[3]), tokenizer.target.encode_source(LINES[4])
    assert example.ids == [*a, *b] and example.weights == [0] * len(a) + [1] * len(b)
    assert b != tokenizer.encode_source(LINES[4])


@pytest.mark.parametrize(
    "name, text, prepared",
    [
        ("xlnet", "  Café ``au''\tlait ", 'Cafe "au" lait'),
        ("xlnet", "\x0bx\x1cy \u0301z", "x y z"),
        ("albert", "  Café ``au''\tLAIT ", 'cafe "au" lait'),
        ("albert", "ÅNGSTRÖM ½", "angstrom 1\u20442"),
    ],
)
def test_what_xlnet_and_albert_do_to_texts(name, text, prepared, tmp_path):
    theirs = spiece_folder(tmp_path / "plain", name)
    assert tokenizers.load(tmp_path / "plain").encode(text) == theirs.encode(prepared)
    spiece_folder(tmp_path / "kept", name, keep_accents=True, do_lower_case=False)
    kept = tokenizers.load(tmp_path / "kept")
    assert kept.encode("Café") == theirs.encode("Café") != theirs.encode(prepared)


def test_a_comma_stands_apart_from_its_number(tmp_path, monkeypatch):
    theirs = spiece_folder(tmp_path, "xlnet")
    tokenizer = tokenizers.load(tmp_path)

    class Joining:
        """Cuts as a model would that has the pieces `_20,` and `99,`."""

        def encode(self, text, out_type):
            joined = {"in 20, 1999,": ["\u2581in", "\u258120,", "\u258119", "99,"]}
            return joined.get(text) or theirs.encode(text, out_type=out_type)

    tokenizer.backend.model = Joining()
    apart = theirs.encode("99", out_type=str)
    apart = apart[1:] if apart[0] == "\u2581" else [apart[0][1:], *apart[1:]]
    want = ["\u2581in", *theirs.encode("20", out_type=str), ",", "\u258119", *apart, ","]
    assert tokenizer.backend.pieces("in 20, 1999,") == want


FRAMES = {  # name: what surrounds one text, and two, with their types
    "t5": ("A0 </s>0", "A0 </s>0 B0 </s>0"),
    "albert": ("[CLS]0 A0 [SEP]0", "[CLS]0 A0 [SEP]0 B1 [SEP]1"),
    "xlnet": ("A0 <sep>0 <cls>2", "A0 <sep>0 B1 <sep>1 <cls>2"),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_surrounds_texts(name, tmp_path):
    spiece_folder(tmp_path, name)
    tokenizer = tokenizers.load(tmp_path)
    texts = {"A": tokenizer.encode(LINES[3]), "B": tokenizer.encode(LINES[4])}
    for frame, pair in zip(FRAMES[name], (None, LINES[4]), strict=True):
        ids, types = [], []
        for part in frame.split():
            its = texts.get(part[:-1]) or [tokenizer.backend.token_to_id(part[:-1])]
            ids, types = ids + its, types + [int(part[-1])] * len(its)
        assert tokenizer.backend.encode(LINES[3], pair) == (ids, types)
        batch = tokenizer.batch([LINES[3]], None if pair is None else [pair], 12)
        assert batch["input_ids"].shape == (1, 12)
    ids = np.array(tokenizer.encode_source(LINES[3]))
    special = tokenizer.is_special()
    assert special.sum() == {"t5": 103, "albert": 5, "xlnet": 7}[name]
    assert not special[texts["A"]].any() and special[ids[len(texts["A"]) + (name == "albert") :]].all()
    starts = tokenizer.starts_word()
    assert all(
        starts[i] == (special[i] or tokenizer.token(i).startswith("\u2581")) for i in range(tokenizer.vocab_size)
    )


def test_frames_of_masked_models(tmp_path):
    spiece_folder(tmp_path, "albert")
    tokenizer = tokenizers.load(tmp_path)
    frames = Frames.of(tokenizer)
    want = [tokenizer.backend.token_to_id(entry) for entry in ("[CLS]", "[SEP]", "<pad>")]
    assert [frames.cls_id, frames.sep_id, frames.pad_id] == want
    assert tokenizer.role("mask") == tokenizer.backend.token_to_id("[MASK]")


def test_the_longer_text_is_shortened_as_the_other_library_does():
    theirs = backends.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    for first in range(9):
        for second in range(9):
            for room in range(1, 12):
                theirs.enable_truncation(room, strategy="longest_first")
                found = theirs.encode("a " * first, "a " * second)
                want = [found.sequence_ids.count(i) for i in range(2)]
                assert [len(x) for x in _shortened([[0] * first, [0] * second], room)] == want, (first, second, room)


@pytest.mark.parametrize("name", [*SPIECE, "marian"])
def test_saved_folders_read_alike(name, tmp_path):
    make = (
        marian_folder if name == "marian" else lambda path: spiece_folder(path, name, extra_ids=4, model_max_length=99)
    )
    make(tmp_path / "in")
    tokenizer = tokenizers.load(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")  # of an earlier tokenizer, which would be read first
    tokenizer.save(tmp_path / "out")
    again = tokenizers.load(tmp_path / "out")
    assert again.backend.to_str() == tokenizer.backend.to_str()
    for text in [*VARIED, *CODED]:
        assert again.encode_source(text) == tokenizer.encode_source(text)
        assert again.target.encode_source(text) == tokenizer.target.encode_source(text)
    same = lambda t: (t.vocab_size, t.eos_ids, t.bos_id, t.is_special().tolist(), [t.role(r) for r in tokenizers.ROLES])
    assert same(again) == same(tokenizer)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert name == "marian" or (settings["extra_ids"], settings["model_max_length"]) == (4, 99)
    tokenizers.train(LINES, "char", 1).save(tmp_path / "out")  # and the other way round
    assert isinstance(tokenizers.load(tmp_path / "out").backend, backends.Tokenizer)


def test_added_tokens(tmp_path):
    theirs = spiece_folder(
        tmp_path, "t5", extra_ids=0, added_tokens_decoder={"300": {"content": "<new>", "special": True}}
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<word>": 301}))
    tokenizer = tokenizers.load(tmp_path)
    tokenizer.save(tmp_path / "out")
    for t in (tokenizer, tokenizers.load(tmp_path / "out")):
        ids = t.encode("the <new><word>")
        assert ids == [*theirs.encode("the"), 300, 301] and t.decode(ids) == "the<word>" and t.vocab_size == 302


def test_token_caches_tell_models_apart(tmp_path):
    keys = set()
    for name in ("t5", "t5_bytes", "albert"):
        spiece_folder(tmp_path / name, name)
        keys.add(tokenizers.load(tmp_path / name).backend.to_str())
    spiece_folder(tmp_path / "albert", "albert", do_lower_case=False)
    keys.add(tokenizers.load(tmp_path / "albert").backend.to_str())
    assert len(keys) == 4
    (tmp_path / "text.txt").write_text("\n\n".join(LINES))
    tokenizer = tokenizers.load(tmp_path / "t5")
    store = tokens.build(str(tmp_path / "text.txt"), tokenizer, tmp_path / "cache")["train"]
    assert store.ids[-1] == tokenizer.eos_id and set(store.ids.tolist()) < set(range(tokenizer.vocab_size))


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("t5", lambda f: (f / "spiece.model").write_bytes(b"no model"), "spiece.model is not a SentencePiece model"),
        ("t5", lambda f: (f / "spiece.model").write_bytes(b""), "spiece.model is not a SentencePiece model"),
        ("t5", lambda f: (f / "config.json").unlink(), "may be of any family: name it in config.json's model_type"),
        ("t5", lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        ("t5", lambda f: (f / "config.json").write_text('{"model_type": "xlnet"}'), "hold no <sep>, <cls>, which"),
        ("t5", lambda f: (f / "added_tokens.json").write_text('{"a": "b"}'), "added_tokens.json: 'a' has the id 'b'"),
        ("albert", lambda f: (f / "tokenizer_config.json").write_text('{"add_prefix_space": false}'),
         "add_prefix_space=False is not supported"),
        ("marian", lambda f: (f / "target.spm").unlink(), "lacks target.spm"),
        ("marian", lambda f: (f / "vocab.json").write_text('{"</s>": 0}'), "hold no <unk>, which MarianTokenizer"),
        ("marian", lambda f: (f / "vocab.json").write_text("[]"), "vocab.json holds no JSON object"),
        ("marian", lambda f: (f / "tokenizer_config.json").write_text('{"separate_vocabs": true}'),
         "separate_vocabs=True is not supported, only False"),
        ("marian", lambda f: (f / "tokenizer_config.json").write_text('{"sp_model_kwargs": {"alpha": 0.1}}'),
         "sp_model_kwargs={'alpha': 0.1} is not supported"),
    ],
)  # fmt: skip
def test_errors_are_one_line(name, change, words, tmp_path):
    marian_folder(tmp_path) if name == "marian" else spiece_folder(tmp_path, name)
    change(tmp_path)
    with pytest.raises(TokenizerError) as error:
        tokenizers.load(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    spiece_folder(tmp_path, "t5")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"pip install 'llm_jax\[sentencepiece\]'"):
        tokenizers.load(tmp_path)


def test_chats_need_offsets(tmp_path):
    spiece_folder(tmp_path, "t5")
    with pytest.raises(TokenizerError, match="chats need a tokenizer.json"):
        tokenizers.load(tmp_path).backend.encode("the usage").offsets  # noqa: B018
