"""Streams side by side, and words with their characters."""

import numpy as np
import pytest

from llm_jax.data import characters, tokenizers
from llm_jax.data.corpora import CorpusError
from llm_jax.data.loader import Loader
from llm_jax.data.streams import CharacterRows, Streams


class Numbers:
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return {"input_ids": np.arange(index * 5, index * 5 + 6)}


def test_every_row_goes_on_where_the_batch_before_stopped():
    loader = Loader(Streams(Numbers(), 3), 3, seed=7, shuffle=False)
    batches = [next(loader) for _ in range(4)]
    for before, after in zip(batches[:2], batches[1:3], strict=True):
        assert (after["input_ids"][:, 0] == before["input_ids"][:, -1]).all()
    assert [b["continues"].tolist() for b in batches] == [[False] * 3, [True] * 3, [True] * 3, [False] * 3]
    np.testing.assert_array_equal(batches[3]["input_ids"], batches[0]["input_ids"])  # the next epoch
    with pytest.raises(CorpusError, match="11 rows are too few for 12 streams"):
        Streams(Numbers(), 12)


def test_processes_share_the_streams():
    """Each reads its own streams in every batch, so that states stay where they are."""
    parts = [Loader(Streams(Numbers(), 4), 4, 0, i, 2, shuffle=False) for i in range(2)]
    for _ in range(2):
        one, two = (next(p)["input_ids"][:, 0] for p in parts)
        assert ((one // 10) % 2 == 0).all() and ((two // 10) % 2 == 1).all()


def test_words_are_spelled():
    tokenizer = tokenizers.train(["the cat , the dog !", "the end"], "word", 100)
    ids = tokenizer.encode("the dog , a cat")
    assert [tokenizer.token(i) for i in ids] == ["the", "dog", ",", "<unk>", "cat"]
    assert ids[0] == 2  # behind the special entries comes the most frequent

    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"input_ids": np.asarray(ids)}

    row = CharacterRows(One(), tokenizer, 7)[0]
    np.testing.assert_array_equal(row["character_ids"][1], characters.character_ids("dog", 7))
    assert row["character_ids"].shape == (5, 7)
