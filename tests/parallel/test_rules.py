"""Logical names to mesh axes."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import MODELS, abstract

from llm_jax.nn import weights
from llm_jax.nn.ports import PortNode
from llm_jax.nn.stack import unstack
from llm_jax.parallel.mesh import make_mesh
from llm_jax.parallel.rules import TENSOR_PARALLEL, logical_axes, place, size_of, table

MESH = make_mesh({"data": 4, "model": 2})
IDS = np.zeros((1, 4), np.int32)


class Pair(weights.Weight):
    base: Any
    rows: Any

    def axes(self, base):
        return self.replace(base=base, rows=P(*base[:-1]))


class Plugged(PortNode):
    table: Any


@pytest.mark.parametrize(
    "names, shape, spec, why",
    [
        (P("embed", "mlp"), (4, 6), P(None, "model"), ""),
        (P("layers", "heads", "embed"), (3, 8, 4), P(None, "model", None), ""),
        (P("vocab"), (7, 5), P(None, None), "vocab: 7 does not divide by model=2"),
        (P("batch", "length"), (8, 3), P(("replica", "data"), None), ""),
        (P("batch", "mlp"), (6, 4), P(None, "model"), "batch: 6 does not divide by ('replica', 'data')=4"),
        (P(), (2, 2), P(None, None), ""),
    ],
)
def test_place(names, shape, spec, why):
    assert place(names, shape, TENSOR_PARALLEL, MESH) == (spec, why)


def test_of_several_axes_the_first_that_divide_are_taken():
    mesh = make_mesh({"data": 1, "seq": 2, "model": 4})
    assert place(P("batch", "sequence"), (3, 16), TENSOR_PARALLEL, mesh) == (P(None, ("seq", "model")), "")
    spec, why = place(P("batch", "sequence"), (3, 6), TENSOR_PARALLEL, mesh)
    assert spec == P(None, "seq") and why == "sequence: 6 does not divide by ('seq', 'model')=8"


def test_an_axis_of_size_one_is_not_used():
    assert place(P("embed", "mlp"), (4, 7), TENSOR_PARALLEL, make_mesh({"data": 8})) == (P(None, None), "")
    assert size_of(MESH, ("replica", "data", "model")) == 8


@pytest.mark.parametrize(
    "names, words",
    [
        (P("heads", "mlp"), r"mesh axis \['model'\] is used twice in .*heads.*mlp"),
        (P("head", "mlp"), "no rule for the logical axis 'head'; rules name batch, "),
    ],
)
def test_errors(names, words):
    with pytest.raises(ValueError, match=words):
        place(names, (4, 4), TENSOR_PARALLEL, MESH)


def test_every_parameter_of_every_model_has_a_rule():
    for config in MODELS.values():
        params, axes = abstract(config.make(), IDS)
        names = jax.tree.leaves(logical_axes(params, axes), is_leaf=lambda x: isinstance(x, P))
        for n, x in zip(names, jax.tree.leaves(params), strict=True):
            assert len(n) == x.ndim and place(n, x.shape, TENSOR_PARALLEL, MESH).spec is not None


def test_axes_of_unstacked_layers_structured_weights_and_ports():
    params, axes = abstract(MODELS["llama"].make(), IDS)
    one = logical_axes(jax.eval_shape(unstack, params), axes)["decoder"]["layers"]["1"]
    assert one["attention"]["query"]["kernel"] == P("embed", "heads") and one["mlp_norm"]["scale"] == P("norm")

    mlp = params["decoder"]["layers"]["mlp"]
    mlp["up"]["kernel"] = Pair(mlp["up"]["kernel"], np.zeros((2, 12)))
    mlp["adapter"] = Plugged(np.zeros((2, 12, 3)))
    names = logical_axes(params, axes)["decoder"]["layers"]["mlp"]
    assert names["up"]["kernel"] == Pair(P("layers", "embed", "mlp"), P("layers", "embed"))
    assert names["adapter"] == Plugged(P(None, None, None))


def test_table_snapshot():
    """A change here is legitimate where a rule or a parameter changed; read it, then paste it."""
    params, axes = abstract(MODELS["qwen2"].make(), IDS)
    specs = jax.tree.map(
        lambda n, x: place(n, x.shape, TENSOR_PARALLEL, MESH).spec, axes, params, is_leaf=lambda x: isinstance(x, P)
    )
    assert table(specs) == SNAPSHOT.strip()


SNAPSHOT = """
decoder/layers/attention/key/bias      (None, 'model')
decoder/layers/attention/key/kernel    (None, None, 'model')
decoder/layers/attention/out/kernel    (None, 'model', None)
decoder/layers/attention/query/bias    (None, 'model')
decoder/layers/attention/query/kernel  (None, None, 'model')
decoder/layers/attention/value/bias    (None, 'model')
decoder/layers/attention/value/kernel  (None, None, 'model')
decoder/layers/attention_norm/scale    (None, None)
decoder/layers/mlp/down/kernel         (None, 'model', None)
decoder/layers/mlp/gate/kernel         (None, None, 'model')
decoder/layers/mlp/up/kernel           (None, None, 'model')
decoder/layers/mlp_norm/scale          (None, None)
embed/embedding                        ('model', None)
final_norm/scale                       (None,)
"""
