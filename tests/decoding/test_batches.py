"""Batches of prompts: outputs stay with their prompts, and empty lines are not decoded."""

import pytest

from llm_jax.decoding.batches import in_batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_return", [1, 2])
def test_outputs_stand_in_the_order_of_prompts(batch_size, num_return):
    prompts = [[1], None, [2], [3], None, None, [4]]
    calls = []

    def decode(batch):
        calls.append(batch)
        return [(prompt[0], i) for prompt in batch for i in range(num_return)]

    found = list(in_batches(decode, prompts, batch_size, num_return))
    wanted = [None if p is None else (p[0], i) for p in prompts for i in range(num_return)]
    assert found == wanted
    assert [p for batch in calls for p in batch] == [[1], [2], [3], [4]]
    assert all(0 < len(batch) <= batch_size for batch in calls)


def test_a_batch_is_decoded_when_it_is_needed():
    calls = []
    outputs = in_batches(lambda batch: calls.append(batch) or [0] * len(batch), [[1], [2], [3]], 2)
    next(outputs)
    assert calls == [[[1], [2]]]
