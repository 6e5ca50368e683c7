"""Marian's, T5's, ALBERT's and XLNet's own tokenizers: the same ids, types and texts; and a translation end to end.

transformers 5 builds T5's, ALBERT's and XLNet's as Unigram models of `tokenizers`, which spells a few texts otherwise
than SentencePiece (`pieces.HARD`, and byte fallback), and keeps the second of two blanks in front of a decoded text;
there tests/data/test_sentencepiece.py holds us to the library.
"""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from pieces import CODED, SPIECE, TEXTS, VARIED, marian_folder, spiece_folder

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.decoding.beam import BeamConfig, BeamSearch

LINES = [line for line in TEXTS["fr"].splitlines() if line.strip()][::7]
ALIKE = [name for name in SPIECE if name not in ("t5_bytes", "t5_bpe")]


@pytest.mark.parametrize("name", ALIKE)
def test_ids_types_and_texts(name, tmp_path):
    spiece_folder(tmp_path, name)
    ours = tokenizers.load(tmp_path)
    theirs = getattr(transformers, SPIECE[name][1]).from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) and ours.eos_id == theirs.eos_token_id
    assert [ours.role(r) for r in ("pad", "unk", "mask")] == [
        theirs.pad_token_id,
        theirs.unk_token_id,
        theirs.mask_token_id,
    ]
    for text in [*VARIED, *LINES]:
        want = theirs(text, return_token_type_ids=True)
        found = ours.backend.encode(text)
        assert found.ids == want["input_ids"], text
        assert found.type_ids == want["token_type_ids"], text
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        for skip in (True, False):
            said = theirs.decode(found.ids, skip_special_tokens=skip)
            assert ours.decode(found.ids, skip).lstrip(" ") == said.lstrip(" "), text
    ours.save(tmp_path / "out")
    again = getattr(transformers, SPIECE[name][1]).from_pretrained(tmp_path / "out")
    assert again(VARIED)["input_ids"] == theirs(VARIED)["input_ids"]
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(9))]
        assert ours.decode(ids).lstrip(" ") == theirs.decode(ids, skip_special_tokens=True).lstrip(" "), ids
    for length in (None, 12, 5):
        first, second = LINES[:6], LINES[6:12]
        found = ours.batch(first, second, length)
        cut = dict(truncation=length is not None, max_length=length, padding_side="right", return_tensors="np")
        want = theirs(first, second, padding=True, **cut)
        mask = found["attention_mask"]
        np.testing.assert_array_equal(mask, want["attention_mask"])
        np.testing.assert_array_equal(found["input_ids"] * mask, want["input_ids"] * mask)


def test_marian(tmp_path):
    marian_folder(tmp_path / "in")
    theirs = transformers.MarianTokenizer.from_pretrained(tmp_path / "in")
    theirs.save_pretrained(tmp_path / "saved")
    tokenizers.load(tmp_path / "in").save(tmp_path / "ours")
    for folder in ("in", "saved", "ours"):
        ours = tokenizers.load(tmp_path / folder)
        again = transformers.MarianTokenizer.from_pretrained(tmp_path / folder)
        assert (ours.eos_id, ours.role("pad"), ours.role("unk")) == (0, theirs.pad_token_id, theirs.unk_token_id)
        for text in [*VARIED, *CODED, *LINES]:
            source, target = ours.encode_source(text), ours.target.encode_source(text)
            assert source == theirs(text)["input_ids"] == again(text)["input_ids"], text
            assert target == theirs(text_target=text)["input_ids"], text
            for ids in (source, target):
                for use_source in (True, False):  # the two models put these pieces together alike
                    want = theirs.decode(ids, skip_special_tokens=True, use_source_tokenizer=use_source)
                    assert ours.decode(ids) == want, text
                blankless = lambda text: text.replace(" ", "")  # of which transformers puts one behind special tokens
                assert blankless(ours.decode(ids, False)) == blankless(theirs.decode(ids)), text


def test_a_translation_end_to_end(tmp_path):
    _, vocab = marian_folder(tmp_path)
    config = transformers.MarianConfig(
        vocab_size=len(vocab), d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=vocab["<pad>"], decoder_start_token_id=vocab["<pad>"], eos_token_id=0, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    model = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    texts = [">>fra<< the usage", "naïve café"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    want = model.generate(**batch, num_beams=3, max_new_tokens=8, forced_eos_token_id=None, bad_words_ids=None)
    loaded = interop.load(tmp_path)
    search = BeamSearch(loaded.model, loaded.params, loaded.tokenizer.eos_ids, BeamConfig(3))
    found = search.search([loaded.tokenizer.encode_source(t) for t in texts], 8)
    assert [loaded.tokenizer.decode(row[0].tokens) for row in found] == tokenizer.batch_decode(
        want, skip_special_tokens=True
    )
    interop.save(tmp_path / "out", loaded.model, loaded.params, loaded.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, transformers.MarianTokenizer)
    assert [theirs(t)["input_ids"] for t in texts] == [tokenizer(t)["input_ids"] for t in texts]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "MarianTokenizer"
