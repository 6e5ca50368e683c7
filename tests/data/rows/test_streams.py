"""Streams side by side, and words with their characters."""

import numpy as np
import pytest

from llm_jax.data import characters, tokenizers
from llm_jax.data.corpora import CorpusError
from llm_jax.data.loader import Loader
from llm_jax.data.rows.streams import CharacterRows, Streams


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


# the blocks of a batch that each process reads, of all blocks; wires may put a process's blocks apart
PROCESSES = {"1": [[0]], "2": [[0], [1]], "4": [[0], [1], [2], [3]], "2 apart": [[0, 2], [1, 3]]}


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("blocks", PROCESSES.values(), ids=PROCESSES)
def test_row_b_of_a_batch_is_the_same_stream_on_any_number_of_processes(blocks, both_ways):
    """What a model carries is stored by row: some processes save it, others read it on."""
    count = sum(map(len, blocks))
    make = lambda *blocks: Loader(Streams(Numbers(), 4, both_ways), 4, 0, *blocks, shuffle=False)
    alone = make()
    batches, states = zip(*((next(alone), alone.state()) for _ in range(5)), strict=True)  # over the end of an epoch
    positions = [[4 // count * block + i for block in mine for i in range(4 // count)] for mine in blocks]
    for resumed_at in (0, 2):
        parts = [make(mine, count) for mine in blocks]
        for part in parts if resumed_at else ():
            part.restore(states[resumed_at - 1])
        ends = {}
        for i in range(resumed_at, len(batches)):
            for part, mine in zip(parts, positions, strict=True):
                share = next(part)
                assert part.state() == states[i]
                for name, values in batches[i].items():
                    np.testing.assert_array_equal(share[name], values[mine])
                for row, ids, continues in zip(mine, share["input_ids"], share["continues"], strict=True):
                    assert not continues or ends.get(row, ids[0]) == ids[0]
                    ends[row] = ids[-1]


def test_streams_of_the_second_half_run_backwards_and_say_so():
    rows = Streams(Numbers(), 4, both_ways=True)
    first, last = rows[3], rows[7]  # the fourth stream, from the end of its text on
    assert [r["backwards"] for r in (rows[0], rows[1], rows[2], first)] == [False, False, True, True]
    assert first["input_ids"].tolist() == list(range(40, 34, -1)) and last["input_ids"].tolist() == list(
        range(35, 29, -1)
    )
    assert (first["continues"], last["continues"]) == (False, True) and "backwards" not in Streams(Numbers(), 4)[3]


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
