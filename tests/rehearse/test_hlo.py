"""Programs read back: small ones written here in the compiler's words, and compiled ones whose counts are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_program import TPU

from llm_jax.parallel.mesh import make_mesh
from llm_jax.rehearse import hlo


def test_a_tpus_program():
    gather, permute = hlo.collectives(TPU)
    assert (gather.kind, gather.size, gather.times, gather.asynchronous) == ("all-gather", 8 * 64 * 2, 4, True)
    assert gather.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and gather.where == "jit(step)/up"
    assert gather.cover == 130  # what runs between its first and its last link
    assert gather.sent(5) == gather.received(5) == 4 * 8 * 64 * 2 * 3 / 4
    assert (permute.kind, permute.size, permute.times, permute.cover) == ("collective-permute", 256, 4, 11)
    assert [permute.sent(i) for i in range(4)] == [1024.0] * 3 + [0.0]
    assert hlo.parse(TPU).cycles() == 4 * (5 + 100 + 30 + 5 + 11)  # and not the 1,000 inside of a fusion


@pytest.mark.parametrize(
    "kind, size",
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[4]{0}, s4[4]{0:S(1)}, pred[3])", 21),
        ("f8e4m3b11fnuz[8]", 8),
        ("u32[]{:S(2)}", 4),
        ("token[]", 0),
    ],
)
def test_bytes(kind, size):
    assert hlo.bytes_of(kind) == size


@pytest.mark.parametrize(
    "groups_text, groups",
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'z'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['x'=2,'y'=4], device_ids=([2,2,2]T(1,0,2)) {'y'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_groups(groups_text, groups):
    head = "HloModule m, num_partitions=4\n%add (a: f32[]) -> f32[] {\n}\n"
    head += "ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4] parameter(0)\n  %r = "
    program = f"{head}f32[4] all-reduce(%p), replica_groups={groups_text}, to_apply=%add\n}}\n"
    assert hlo.collectives(program)[0].groups == groups


def test_loops_are_counted_as_often_as_they_turn():
    """3 turns of 5 turns of an all-reduce of 4 floats, and one outside."""
    mesh = make_mesh({"data": 8})

    def inner(x, _):
        return jax.lax.psum(x, "data") / 8, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, 5)[0] * 2, None

    f = lambda x: jax.lax.psum(jax.lax.scan(outer, x, None, 3)[0], "data")
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    found = hlo.collectives(run.lower(np.ones(32, np.float32)).compile().as_text())
    assert sorted((c.kind, c.size, c.times) for c in found) == [("all-reduce", 16, 1), ("all-reduce", 16, 15)]


@functools.cache
def products():
    """Sums along `model`, along `data`, and over all devices (which the compiler takes in two)."""
    mesh = make_mesh({"replica": 2, "data": 2, "model": 2})
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    f = jax.jit(
        lambda a, b, c: (jnp.einsum("ij,jk->ik", a, b), jnp.sum(c, 0), jnp.sum(c)),
        in_shardings=(on(None, "model"), on("model", None), on("data", ("replica", "model"))),
        out_shardings=(on(), on(("replica", "model")), on()),
    )
    x = np.ones((8, 8), np.float32)
    return hlo.collectives(f.lower(x, x, x).compile().as_text()), mesh


def test_axes():
    found, mesh = products()
    assert {hlo.axes_of(c.groups, mesh) for c in found} == {("model",), ("data",), ("replica", "model")}
    assert hlo.axes_of([(0, 1), (2, 3)], mesh) == ("model",)
    assert hlo.axes_of([(0, 2), (2, 0)], mesh) == ("data",)
    assert hlo.axes_of([(0,), (1,)], mesh) == ()
    rows = hlo.table(found, mesh)
    assert rows["all-reduce", "model"] == {"calls": 1, "bytes": 256, "sent": 256.0}


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="holds no ENTRY computation: pass compiled.as_text"):
        hlo.parse("hello")


def test_a_sum_that_is_cut_in_a_fusion_is_a_reduce_scatter():
    text = """HloModule jit_step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (p.0: bf16[64,16]) -> bf16[16,16] {
  %p.0 = bf16[64,16]{1,0} parameter(0)
  %sum = bf16[64,16]{1,0} all-reduce(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = bf16[16,16]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={16,16}
}

ENTRY %main (p.1: bf16[64,16]) -> bf16[16,16] {
  %p.1 = bf16[64,16]{1,0} parameter(0)
  ROOT %fusion = bf16[16,16]{1,0} fusion(%p.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.size, found.sent(0)) == ("reduce-scatter", 64 * 16 * 2, 64 * 16 * 2 * 3 / 4)


def test_loops_of_no_or_one_turn_are_counted_as_the_caller_says():
    """A loop whose scope gives it a name turns as often as the caller says."""

    def f(x, op):
        def tick(x, op):
            with jax.named_scope("turn_end"):
                return jax.lax.fori_loop(0, op, lambda _, x: jnp.sin(x) @ x, x), None

        return jax.lax.scan(tick, x, op)[0]

    program = hlo.parse(jax.jit(f).lower(jnp.ones((8, 8)), jnp.array([0, 1, 0, 1])).compile().as_text())

    def products(turns):
        times = program.calls(turns)
        return sum(times[c] for c, body in program.computations.items() for i in body.values() if i.opcode == "dot")

    assert products({"end": 0.5}) == 4 * 0.5
    assert products({"end": 0.0}) == 0
    assert products(None) == 4
