"""What the tests of whole runs train on."""

import devices
import numpy as np
import pytest


@pytest.fixture
def one_device():
    """For runs that say nothing of sharding: their programs compile and run in less time."""
    with devices.one_device():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "more"]
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)) + "\n")
    return folder
