"""Batches: the same rows in the same order on any number of processes, every row once an epoch, resumed exactly."""

import json

import numpy as np
import pytest

from llm_jax.data.corpora import CorpusError
from llm_jax.data.loader import Loader, eval_batches


class Rows:
    """Row i holds the number i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"input_ids": np.full(3, int(index), np.int32)}


def take(loader, count):
    return [next(loader)["input_ids"][:, 0].tolist() for _ in range(count)]


def loaders(processes, count=24, batch=8, seed=5):
    return [Loader(Rows(count), batch, seed, [p], processes) for p in range(processes)]


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    (loader,) = loaders(1)
    epochs = [sum(take(loader, 3), []) for _ in range(3)]
    assert all(sorted(e) == list(range(24)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3 and epochs[0] != list(range(24))
    (same,), (other,) = loaders(1), loaders(1, seed=6)
    assert sum(take(same, 3), []) == epochs[0] != sum(take(other, 3), [])


def test_rows_that_do_not_fill_a_batch_run_on():
    (loader,) = loaders(1, count=10, batch=4)
    rows = sum(take(loader, 5), [])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def test_batches_of_one_row():
    (one,), (whole,) = loaders(1, batch=1), loaders(1)
    assert sum(take(one, 24), []) == sum(take(whole, 3), [])
    assert sum(zip(*(sum(take(x, 3), []) for x in loaders(8)), strict=True), ()) == tuple(
        sum(take(loaders(1)[0], 3), [])
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_a_batch_holds_the_same_rows_on_any_number_of_processes(processes):
    (alone,) = loaders(1)
    parts = [take(x, 7) for x in loaders(processes)]
    for i, batch in enumerate(take(alone, 7)):
        assert sum((p[i] for p in parts), []) == batch
        assert all(len(p[i]) == 8 // processes for p in parts)


def test_a_process_whose_blocks_lie_apart_reads_those():
    """Meshes follow a machine's wires, so a process may hold the first and the third quarter of a batch."""
    whole = take(Loader(Rows(24), 8, 5), 4)
    one, other = (take(Loader(Rows(24), 8, 5, blocks, 4), 4) for blocks in ([0, 2], [1, 3]))
    for batch, a, b in zip(whole, one, other, strict=True):
        assert a == batch[:2] + batch[4:6] and b == batch[2:4] + batch[6:]


@pytest.mark.parametrize("before, after", [(1, 1), (1, 4), (4, 2)])
def test_the_state_resumes_exactly_onto_any_number_of_processes(before, after):
    (alone,) = loaders(1)
    want = take(alone, 9)
    first = loaders(before)
    for loader in first:
        take(loader, 4)
    states = [json.loads(json.dumps(x.state())) for x in first]
    assert all(s == states[0] for s in states) and len(states[0]) == 1
    again = loaders(after)
    for loader in again:
        loader.restore(states[0])
    parts = [take(x, 5) for x in again]
    for i in range(5):
        assert sum((p[i] for p in parts), []) == want[4 + i]


def test_evaluation_sees_every_row_once_and_weighs_the_filling_nothing():
    batches = list(eval_batches(Rows(10), 4))
    assert [b["input_ids"].shape for b in batches] == [(4, 3)] * 3
    real = [(i, w) for b in batches for i, w in zip(b["input_ids"][:, 0], b["loss_weights"].sum(1), strict=True)]
    assert real == [(i, 3) for i in range(10)] + [(0, 0)] * 2
    assert len(list(eval_batches(Rows(10), 4, limit=2))) == 2 and not list(eval_batches(Rows(0), 4))


def test_errors():
    with pytest.raises(ValueError, match="batch_size=6 does not divide into 4 blocks of processes"):
        Loader(Rows(24), 6, 0, [0], 4)
    with pytest.raises(CorpusError, match="no rows"):
        Loader(Rows(0), 6, 0)
