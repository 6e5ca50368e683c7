import jax
import numpy as np
import pytest

from llm_jax.training.trainable import combine, partition

TREE = {"a": {"kernel": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}, "q": {"values": np.ones(2, np.int8)}}


@pytest.mark.parametrize("patterns, chosen", [("kernel", {"kernel"}), (("a/*",), {"kernel", "bias"})])
def test_partition_and_combine_are_inverse(patterns, chosen):
    trainable, frozen = partition(TREE, patterns)
    assert {k for k, v in trainable["a"].items() if v is not None} == chosen
    assert {k for k, v in frozen["a"].items() if v is not None} == {"kernel", "bias"} - chosen
    assert trainable["q"]["values"] is None and frozen["q"]["values"] is TREE["q"]["values"]
    again = combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(TREE), strict=True))


@pytest.mark.parametrize("patterns", [None, "values"])
def test_integers_do_not_train(patterns):
    with pytest.raises(TypeError, match="q/values holds int8 and cannot train; choose what trains"):
        partition(TREE, patterns)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="'kernle' matches no parameter"):
        partition(TREE, "kernle")


def test_none_trains_everything():
    trainable, frozen = partition(TREE["a"], None)
    assert len(jax.tree.leaves(trainable)) == 2 and not jax.tree.leaves(frozen)
