"""Reading by rules: every tensor that is missing, unexpected or misshapen is named; slices land where they belong."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.delta.lora import Lora
from llm_jax.interop.names import InteropError, Rule, read_params, write_params
from llm_jax.parallel.mesh import make_mesh

RULES = [
    Rule("embed/embedding", "table"),
    Rule("layers/q/kernel", "h.{l}.qk", part=(0, (4, 2))),
    Rule("layers/k/kernel", "h.{l}.qk", part=(1, (4, 2))),
    Rule("layers/up/kernel", "h.{l}.up", transposed=True),
    Rule("layers/up/bias", "h.{l}.up_bias", forward=lambda x: x[::-1], backward=lambda x: x[::-1]),
]
SHAPES = {
    "embed": {"embedding": (8, 4)},
    "layers": {"q": {"kernel": (2, 4, 4)}, "k": {"kernel": (2, 4, 2)}, "up": {"kernel": (2, 4, 6), "bias": (2, 6)}},
}
ABSTRACT = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def theirs(rows=8):
    rng = np.random.default_rng(0)
    shapes = {"table": (rows, 4), **{f"h.{i}.{n}": s for i in (0, 1)
              for n, s in {"qk": (4, 6), "up": (6, 4), "up_bias": (6,)}.items()}}  # fmt: skip
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def read(source, **options):
    return read_params(source, RULES, ABSTRACT, lambda n: n.startswith("buffer"), "folder", **options)


def test_slices_land_where_they_belong():
    source = theirs()
    params = read({**source, "buffer.x": np.ones(1)})
    np.testing.assert_array_equal(params["embed"]["embedding"], source["table"])
    for i in (0, 1):
        layer = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
        np.testing.assert_array_equal(layer["q"]["kernel"], source[f"h.{i}.qk"][:, :4])
        np.testing.assert_array_equal(layer["k"]["kernel"], source[f"h.{i}.qk"][:, 4:])
        np.testing.assert_array_equal(layer["up"]["kernel"], source[f"h.{i}.up"].T)
        np.testing.assert_array_equal(layer["up"]["bias"], source[f"h.{i}.up_bias"][::-1])


def test_writing_is_the_inverse():
    source = theirs()
    again = dict(write_params(read(source), RULES, {}))
    assert again.keys() == source.keys()
    for name, array in source.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    half = dict(write_params(read(source), RULES, {}, jnp.bfloat16))
    assert {a.dtype for a in half.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_structured_weights_are_written_dense():
    source = theirs()
    params = read(source)
    a, b = np.ones((2, 4, 1), np.float32), np.ones((2, 1, 6), np.float32)
    params["layers"]["up"]["kernel"] = Lora(params["layers"]["up"]["kernel"], a, b, 0.5)
    written = dict(write_params(params, RULES, {}))
    np.testing.assert_allclose(written["h.1.up"], source["h.1.up"] + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(written["h.1.qk"], source["h.1.qk"])


def test_a_padded_vocabulary():
    source = theirs(rows=6)
    params = read(source, padded=lambda p: p == "embed/embedding")
    np.testing.assert_array_equal(params["embed"]["embedding"][:6], source["table"])
    assert not params["embed"]["embedding"][6:].any()
    written = dict(write_params(params, RULES, {"embed/embedding": 6}))
    np.testing.assert_array_equal(written["table"], source["table"])
    with pytest.raises(InteropError, match=r"table has shape \[6, 4\], the config asks for \[8, 4\]"):
        read(source)
    with pytest.raises(InteropError, match=r"table has shape \[9, 4\], the config asks for \[8, 4\]"):
        read(theirs(rows=9), padded=lambda p: p == "embed/embedding")


def test_casting():
    source = theirs() | {"h.0.up": theirs()["h.0.up"].astype(ml_dtypes.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(read(source, dtype=jnp.float16))} == {jnp.dtype("float16")}
    stored = {n: a.astype(ml_dtypes.bfloat16) for n, a in theirs().items()}
    assert {x.dtype for x in jax.tree.leaves(read(stored))} == {jnp.dtype("bfloat16")}


def test_every_slice_is_read_where_it_is_wanted():
    mesh = make_mesh({"data": 4, "model": 2})
    specs = {"embed": {"embedding": P("data")}, "layers": {"q": {"kernel": P(None, None, "model")},
             "k": {"kernel": P("model")}, "up": {"kernel": P(None, "data", "model"), "bias": P()}}}  # fmt: skip
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    params, plain = read(theirs(), shardings=shardings), read(theirs())
    for a, b, s in zip(*map(jax.tree.leaves, (params, plain, shardings)), strict=True):
        assert a.sharding == s
        np.testing.assert_array_equal(a, b)


def without(name, **more):
    return {k: v for k, v in theirs().items() if k != name} | {k.replace("__", "."): v for k, v in more.items()}


ERRORS = [
    (without("h.1.up"), "missing h.1.up"),
    (without("", extra=np.ones(1)), "unexpected extra"),
    (without("table", h__2__up=np.ones((6, 4))), "missing table; unexpected h.2.up"),
    ({}, "missing h.0.qk, h.0.up, h.0.up_bias, h.1.qk and 3 more"),
    (without("", h__1__up=np.ones((4, 6))), "h.1.up has shape [6, 4], the config asks for [4, 6]"),
    (without("", h__0__qk=np.ones((4, 7))), "h.0.qk has shape (4, 7), expected 6 in the split dimension"),
    (without("", table=np.ones(8)), "table has shape [8], the config asks for [8, 4]"),
]


@pytest.mark.parametrize("source, message", ERRORS)
def test_what_does_not_fit_is_named(source, message):
    with pytest.raises(InteropError) as error:
        read(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parameters_without_a_place_are_named():
    params = {**read(theirs()), "adapter": {"kernel": np.ones(1)}}
    with pytest.raises(InteropError, match="adapter/kernel have no place in that format"):
        list(write_params(params, RULES, {}))
    with pytest.raises(InteropError, match=r"no rule for \['adapter/kernel'\]"):
        read_params(theirs(), RULES, jax.eval_shape(lambda: params), lambda n: False, "folder")
