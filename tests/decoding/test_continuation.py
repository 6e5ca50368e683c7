"""What streams behind a prompt is the decoded whole, for every kind of tokenizer and wherever pieces are cut."""

import os
import random

import pytest
from pieces import SPIECE, marian_folder, spiece_folder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.data import tokenizers
from llm_jax.data.tokenizers import KINDS, Tokenizer
from llm_jax.decoding.continuation import Continuation

TEXTS = ["hello world, the unseen worlds don't", "naïve e\u0301 café", "👨\u200d👩\u200d👧 😀 日本語", "a\nb\tc  d"] * 9
PROMPTS = ["hello", "hello ", "the world", "naïve e", "👨\u200d", "日本", "a\n", "x"]


def byte_pieces():
    """Llama 1 and 2: Metaspace, and single bytes for what has no entry."""
    metaspace = "\u2581"
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), metaspace, *"helowrd,tuns'"]
    merges = [(metaspace, "w"), ("h", "e"), ("l", "l"), ("he", "ll")]
    entries += [a + b for a, b in merges]
    vocab = {entry: i for i, entry in enumerate(entries)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace(metaspace, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


def ends_of_words():
    """GPT-1: pieces that end a word say so."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def tokenizer(kind):
        if kind in KINDS:
            return tokenizers.train(TEXTS, kind, {"bpe": 300, "wordpiece": 90}.get(kind, 60))
        if kind in ("bytes", "ends"):
            return byte_pieces() if kind == "bytes" else ends_of_words()
        folder = tmp_path_factory.mktemp(kind)
        marian_folder(folder) if kind == "marian" else spiece_folder(folder, kind)
        return tokenizers.load(folder)

    return tokenizer


@pytest.mark.parametrize("kind", [*KINDS, "bytes", "ends", "marian", *SPIECE])
def test_pieces_joined_are_the_decoded_whole(kind, make):
    tokenizer, rng = make(kind), random.Random(0)
    size = tokenizer.vocab_size
    odd = [i for i in range(size) if "\ufffd" in tokenizer.decode([i])] or [0]  # parts of characters
    for trial in range(150):
        prompt = tokenizer.encode(rng.choice(PROMPTS)) + [rng.randrange(size)] * (trial % 2)
        new = tokenizer.encode(rng.choice(TEXTS))[: rng.randrange(12)] if trial % 3 else []
        new += [rng.choice(odd) if rng.random() < 0.4 else rng.randrange(size) for _ in range(rng.randrange(9))]
        before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
        want = whole[len(os.path.commonprefix((before, whole))) :]  # but for half a character the prompt's own text
        follow = Continuation(tokenizer.decode, prompt, window=3)
        step, pieces = rng.randrange(1, 4), []
        for end in [*range(step, len(new), step), len(new)]:
            pieces.append(follow.piece(new[:end], end == len(new)))
        assert "".join(pieces) == want == Continuation(tokenizer.decode, prompt, window=3).text(new), (
            prompt,
            new,
            pieces,
        )


@pytest.mark.parametrize("kind", ["unigram", "bytes", "t5", "wordpiece", "word", "bpe"])
def test_the_seam(kind, make):
    """What is decoded alone loses its blank, or keeps marks that belong to the word before."""
    tokenizer = make(kind)
    ids = tokenizer.encode("hello world")
    cut = 1 + max(i for i in range(len(ids) - 1) if tokenizer.decode(ids[: i + 1]) == "hello")
    assert Continuation(tokenizer.decode, ids[:cut]).text(ids[cut:]) == " world"
    assert Continuation(tokenizer.decode, []).text(ids[cut:]).strip() == "world"  # a text of its own


def test_bytes_wait_for_the_end_of_their_run(make):
    """A byte that fits no character spoils all bytes beside it: what was whole is not shown until that is certain."""
    tokenizer = make("bytes")
    byte = lambda *values: [tokenizer.backend.token_to_id(f"<0x{v:02X}>") for v in values]
    euro, prompt = byte(0xE2, 0x82, 0xAC), tokenizer.encode("hello")
    follow = Continuation(tokenizer.decode, prompt)
    assert [follow.piece(euro[:n], False) for n in (1, 2, 3)] == ["", "", ""]
    assert follow.piece([*euro, *byte(0xE2)], False) == ""
    assert follow.piece([*euro, *byte(0xE2), *tokenizer.encode("he")], True) == "\ufffd" * 4 + " he"
    follow = Continuation(tokenizer.decode, prompt)
    assert follow.piece([*euro, *tokenizer.encode("he")], False) == "€ he"


def test_stop_strings_across_the_seam(make):
    tokenizer = make("unigram")
    prompt, new = tokenizer.encode("hello"), tokenizer.encode("world, the world")
    for stops in ([" world"], ["the", ","], ["worlds"], ["d, t"]):
        whole = Continuation(tokenizer.decode, prompt).text(new)
        want = whole[: min((whole.index(s) for s in stops if s in whole), default=len(whole))]
        follow = Continuation(tokenizer.decode, prompt, stops)
        pieces = [follow.piece(new[:n], n == len(new)) for n in range(1, len(new) + 1)]
        assert "".join(pieces) == want
    assert Continuation(tokenizer.decode, prompt, [" world"]).text(new) == ""
