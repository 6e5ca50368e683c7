"""Learns vocabularies, and replays how BPE learned its merges.

Sources: Sennrich et al. 2016 (BPE), https://arxiv.org/abs/1508.07909; Schuster and Nakajima 2012 (WordPiece); Kudo
2018 (Unigram), https://arxiv.org/abs/1804.10959.
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.data.sentencepiece import TokenizerError
from llm_jax.data.tokenizer import END_OF_TEXT, Tokenizer

MASKED_SPECIAL = ("[SEP]", "[PAD]", "[CLS]", "[MASK]")  # of the vocabularies trained here for masked models
KINDS = ("bpe", "wordpiece", "unigram", "char", "word")


def blanks() -> Tokenizer:
    """Cuts at blanks and knows no word: for models that spell words themselves."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def train(
    texts: Iterable[str], kind: str, vocab_size: int, special: Sequence[str] = (END_OF_TEXT,), sentinels: int = 0
) -> Tokenizer:
    """Learns a vocabulary.

    Args:
      texts: any iterator of text.
      kind: `bpe` (byte-level), `wordpiece`, `unigram`, `char` (the characters seen; `vocab_size` is not used) or `word`
        (words and punctuation, the most frequent first).
      vocab_size: entries, special tokens included.
      special: the first one separates documents.
      sentinels: entries at the end that stand for spans of a text, as T5's; entry V - 1 - i is `<extra_id_i>`.

    Raises:
      TokenizerError: on an unknown kind or a size below the base vocabulary.
    """
    if kind not in KINDS:
        raise TokenizerError(f"tokenizer kind={kind!r} is not one of {', '.join(KINDS)}")
    vocab_size -= sentinels
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(special), "show_progress": False}
    if kind == "bpe":
        if vocab_size < 256 + len(special):
            raise TokenizerError(f"vocab_size={vocab_size} is below the 256 bytes and {len(special)} special tokens")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif kind == "wordpiece":
        common["special_tokens"] = [*special, "[UNK]"]
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    elif kind == "unigram":
        common["special_tokens"] = [*special, "<unk>"]
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    elif kind == "word":
        common["special_tokens"] = [*special, "<unk>"]
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    else:
        common |= {"vocab_size": 2**31 - 1, "special_tokens": [*special, "<unk>"]}
        trainer = trainers.WordLevelTrainer(**common)
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    try:
        backend.train_from_iterator(texts, trainer)
    except ValueError:  # a corpus that cannot be read says so itself
        raise
    except Exception as e:
        raise TokenizerError(f"a {kind} tokenizer of vocab_size={vocab_size} cannot be trained: {e}") from e
    if {"[CLS]", "[SEP]"} <= set(special):
        ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    if sentinels:
        unused = [f"<unused_{i}>" for i in range(vocab_size - backend.get_vocab_size())]
        backend.add_special_tokens([*unused, *(f"<extra_id_{i}>" for i in reversed(range(sentinels)))])
    first = backend.token_to_id(special[0]) if special else None
    return Tokenizer(backend, None, [] if first is None else [first])


class Merge(NamedTuple):
    """One step of BPE on the replayed words: the pair, how often it stood there, and the words after it."""

    pair: tuple[str, str]
    occurrences: int
    words: dict[str, tuple[str, ...]]


def replay_merges(tokenizer: Tokenizer, words: Mapping[str, int]) -> list[Merge]:
    """Replays the learned merges, in the order learned, on given words with their counts.

    Shows what the algorithm sees: which pair is merged, how often it occurs in these words, and into which pieces
    each word is cut afterwards. Merges that touch none of the words are left out.

    Raises:
      TokenizerError: if the tokenizer is not BPE.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"merges can be replayed for BPE only, this is {model['type']}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {w: tuple(byte_level.pre_tokenize_str(w)[0][0]) for w in words}
    history = []
    for merge in model["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        counts: collections.Counter[str] = collections.Counter()
        for word, cut in pieces.items():
            joined = _merge(cut, a, b)
            if len(joined) != len(cut):
                counts[word] = words[word] * (len(cut) - len(joined))
                pieces[word] = joined
        if counts:
            history.append(Merge((a, b), counts.total(), dict(pieces)))
    return history


def _merge(cut: tuple[str, ...], a: str, b: str) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(cut):
        if i + 1 < len(cut) and cut[i] == a and cut[i + 1] == b:
            out.append(a + b)
            i += 2
        else:
            out.append(cut[i])
            i += 1
    return tuple(out)
