import jax
import pytest
from flax import struct

from llm_jax.nn import paths


class Pair(struct.PyTreeNode):
    left: int
    right: int


NAMES = [
    "decoder/layers/attention/query/kernel",
    "decoder/layers/attention/query/bias",
    "decoder/layers/0/mlp/up/kernel",
    "decoder/layers/10/mlp/up/kernel",
    "embed/embedding",
]


@pytest.mark.parametrize(
    "pattern, chosen",
    [
        ("kernel", [0, 2, 3]),
        ("query/kernel", [0]),
        ("ery/kernel", None),  # a suffix begins at a component
        ("embed/embedding", [4]),
        ("attention/*", [0, 1]),
        ("up/k*", [2, 3]),
        ("layers/?/mlp/*", [2]),
        ("layers/[0-9]*/mlp/up/kernel", [2, 3]),
        ("re:.*layers/(0|1)/.*", [2]),
        ("re:layers.*", None),  # the whole path
        (["bias", "embedding"], [1, 4]),
        (["bias", "nothing"], None),
    ],
)
def test_patterns(pattern, chosen):
    if chosen is None:
        with pytest.raises(ValueError, match="matches no parameter; paths look like .*query/kernel"):
            paths.select(NAMES, pattern)
    else:
        assert paths.select(NAMES, pattern) == [NAMES[i] for i in chosen]
        assert [paths.matcher(pattern)(n) for n in NAMES] == [i in chosen for i in range(len(NAMES))]


def test_paths_of_every_kind_of_node():
    tree = {"b": [1, (2, 3)], "a": Pair(4, 5)}
    assert paths.flatten(tree) == [("a/left", 4), ("a/right", 5), ("b/0", 1), ("b/1/0", 2), ("b/1/1", 3)]
    doubled = paths.map_with_path(lambda p, x, y: f"{p}={x + y}", tree, tree)
    assert jax.tree.leaves(doubled) == ["a/left=8", "a/right=10", "b/0=2", "b/1/0=4", "b/1/1=6"]
