import jax
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.zero import divide, divide_tree, state_specs

MESH = make_mesh({"data": 4, "model": 2})
array = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")


@pytest.mark.parametrize(
    "spec, shape, avoid, want",
    [
        (P(), (8, 16), (), P("data", None)),  # along the last none, if another divides
        (P(), (6, 16), (), P(None, "data")),
        (P(), (8, 16, 4), (), P(None, "data", None)),  # the largest of the others
        (P(None, "model"), (8, 16), (), P("data", "model")),  # the largest that is free
        (P(), (8, 8), (), P("data", None)),  # the first of equals
        (P(), (6, 16, 3), (), P(None, "data", None)),
        (P("model"), (8, 6), (), P("model", None)),  # none divides
        (P(), (), (), P()),
        (P(), (0, 3), (), P(None, None)),
        (P(), (16, 8), (0,), P(None, "data")),  # the layer axis last
        (P(), (16, 6), (0,), P("data", None)),  # but rather than not at all
    ],
)
def test_divide(spec, shape, avoid, want):
    assert divide(spec, shape, MESH, "data", avoid) == want


@pytest.mark.parametrize(
    "shape, want",
    [
        ((48, 64), P(None, "data")),  # 12 rows are not a whole tile, 16 columns are
        ((64, 64), P("data", None)),
        ((48, 40), P("data", None)),  # neither: rows
        ((12, 6), P("data", None)),
    ],
)
def test_divide_turned(shape, want):
    assert divide(P(), shape, MESH, "data", turned=True) == want
    assert divide(P(), shape, MESH, "data") == P("data", None)


def test_divide_by_one_changes_nothing():
    assert divide(P(), (8, 8), make_mesh({"model": 8}), "data") == P(None, None)


def test_divide_tree_avoids_layers():
    params = {"k": array(16, 8), "stacked": array(16, 8)}
    names = {"k": P("embed", "mlp"), "stacked": P("layers", "embed")}
    specs = {"k": P(None, "model"), "stacked": P(None, None)}
    assert divide_tree(specs, params, names, MESH, "data") == {"k": P("data", "model"), "stacked": P(None, "data")}


@pytest.mark.parametrize("axis, other", [("data", P(None, "data")), (None, P())])
def test_state_takes_the_spec_of_its_parameter(axis, other):
    """By path and shape; a factored statistic of the same path has another shape."""
    by_path = {"a/kernel": ((4, 8), P("model", "data")), "kernel": ((4, 8), P("data", "model"))}
    state = {"mu": {"a": {"kernel": array(4, 8)}, "kernel": array(4, 8)}, "row": {"a": {"kernel": array(3, 4)}}}
    specs = state_specs(state, by_path, MESH, axis)
    assert specs["mu"] == {"a": {"kernel": P("model", "data")}, "kernel": P("data", "model")}
    assert specs["row"]["a"]["kernel"] == other
