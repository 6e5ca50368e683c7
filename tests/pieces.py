"""Tiny SentencePiece models, trained on sources of the standard library, in folders as the families keep them."""

import argparse
import functools
import io
import json
import pathlib
import textwrap

import sentencepiece

ACCENTS = ["naïve café, déjà vu: 12,345 of 3,000 and 20, 1999,", "Ünïcödé e\u0301té ¿qué? ½"] * 20
TEXTS = {name: pathlib.Path(m.__file__).read_text() for name, m in (("en", argparse), ("fr", textwrap))}

# what a text may hold that the library and transformers cut alike
VARIED = [
    *("", " ", "the usage", "  two  blanks ", "naïve café, déjà vu", "12,345 apples and 9, 20,", "é e\u0301 Å"),
    *(
        "😀 smile 😀😀",
        "tab\tand\nline\r\n",
        "ﬁne ① ½ ＡＢＣ",
        "ĳ ß Ω",
        "日本語 text",
        "x" * 70,
        "\u200bzero\u00a0width",
    ),
    *(
        "``quoted'' \"text\"",
        "</s> and <unk> inside",
        "a<pad>b",
        "a \u2581 b",
        "UPPER Case",
        "[MASK] <mask> <extra_id_3>.",
    ),
]
CODED = [
    ">>fra<< the usage",
    ">>xx<< unknown",
    "say >>fra<< later",
    ">>fra<<",
    ">>fra",
    " >>fra<< x",
    ">>fra<<>>fra<< x",
]
# what transformers' Unigram models spell otherwise: marks behind letters that are replaced, control characters
HARD = ["Vie\u0323\u0302t Nam", "\uff34\u0325x", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "\x0bx\x1cy\x7f", "\u0301a"]


@functools.cache
def model(language: str = "en", **options) -> bytes:
    """A serialized model."""
    out = io.BytesIO()
    lines = [line for line in TEXTS[language].splitlines() if line.strip()][:800] + ACCENTS
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **{"vocab_size": 300, **options}
    )
    return out.getvalue()


T5 = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
SPIECE = {  # name: model_type, tokenizer class, how its authors numbered the special entries
    "t5": ("t5", "T5Tokenizer", T5),
    "t5_bytes": ("t5", "T5Tokenizer", dict(T5, byte_fallback=True, vocab_size=600)),
    "t5_bpe": ("t5", "T5Tokenizer", dict(T5, model_type="bpe")),
    "albert": ("albert", "AlbertTokenizer", dict(pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
               control_symbols="[CLS],[SEP],[MASK]", normalization_rule_name="nmt_nfkc_cf")),
    "xlnet": ("xlnet", "XLNetTokenizer", dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
              control_symbols="<cls>,<sep>,<pad>,<mask>", user_defined_symbols="<eod>,<eop>")),
}  # fmt: skip


def spiece_folder(path: pathlib.Path, name: str, **settings) -> sentencepiece.SentencePieceProcessor:
    """Writes `spiece.model` and the config that names the family; the library's own reading of it."""
    kind, _, options = SPIECE[name]
    path.mkdir(parents=True, exist_ok=True)
    (path / "spiece.model").write_bytes(model(**options))
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=model(**options))


def marian_folder(path: pathlib.Path) -> tuple[list[sentencepiece.SentencePieceProcessor], dict[str, int]]:
    """Writes source.spm, target.spm and vocab.json, which lacks some pieces; both models and the vocabulary."""
    path.mkdir(parents=True, exist_ok=True)
    both = [sentencepiece.SentencePieceProcessor(model_proto=model(language)) for language in TEXTS]
    for name, its in zip(("source.spm", "target.spm"), both, strict=True):
        (path / name).write_bytes(its.serialized_model_proto())
    pieces = {m.id_to_piece(i) for m in both for i in range(3, m.get_piece_size() - 20)}
    entries = ["</s>", "<unk>", *sorted(pieces), ">>fra<<", ">>deu<<", "<pad>"]
    vocab = {entry: i for i, entry in enumerate(entries)}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "config.json").write_text(json.dumps({"model_type": "marian"}))
    return both, vocab
