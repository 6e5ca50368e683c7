"""Against numpy, bytes against the compiled program, and data parallelism with and without a server."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.parallel import collectives
from llm_jax.parallel.mesh import make_mesh
from llm_jax.rehearse import hlo

N = 8
X = np.random.default_rng(0).integers(-99, 99, (N, 2 * N, 3)).astype(np.int32)  # a row a device


def only(at, value):
    return np.stack([value if i == at else np.zeros_like(value) for i in range(len(X))])


REFERENCES = {
    "broadcast": lambda x: np.broadcast_to(x[0], x.shape),
    "reduce": lambda x: only(0, x.sum(0)),
    "all_reduce": lambda x: np.broadcast_to(x.sum(0), x.shape),
    "reduce_scatter": lambda x: x.sum(0).reshape(len(x), -1, *x.shape[2:]),
    "all_gather": lambda x: np.broadcast_to(np.concatenate(x), (len(x), len(x) * x.shape[1], *x.shape[2:])),
    "all_to_all": lambda x: np.stack([np.concatenate(b) for b in zip(*(np.split(r, len(x)) for r in x), strict=True)]),
}  # fmt: skip


def spread(f, n=N):
    """`f` of every row on a device of its own."""
    mesh = make_mesh({"data": n}, jax.devices()[:n])
    spec = P("data")
    return jax.jit(jax.shard_map(lambda x: f(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@pytest.mark.parametrize("name", collectives.COLLECTIVES)
def test_equals_numpy(name):
    got = spread(lambda x: collectives.COLLECTIVES[name](x, "data"))(X)
    np.testing.assert_array_equal(got, REFERENCES[name](X))


@pytest.mark.parametrize("n, root", [(8, 3), (5, 4), (3, 1), (1, 0)])
def test_trees_from_any_root_over_any_number(n, root):
    x = X[:n]
    np.testing.assert_array_equal(spread(lambda x: collectives.broadcast(x, "data", root), n)(x), [x[root]] * n)
    got = np.asarray(spread(lambda x: collectives.reduce(x, "data", root), n)(x))
    np.testing.assert_array_equal(got[root], x.sum(0))
    assert not np.delete(got, root, 0).any()


def test_reduce_scatter_and_all_gather_are_all_reduce():
    both = spread(lambda x: collectives.all_gather(collectives.reduce_scatter(x, "data"), "data"))(X)
    np.testing.assert_array_equal(both, spread(lambda x: collectives.all_reduce(x, "data"))(X))


@pytest.mark.parametrize("name", [*collectives.COLLECTIVES, "push", "pull"])
def test_bytes_are_those_of_the_compiled_program(name):
    f = getattr(collectives, name)
    x = X.astype(np.float32)
    moves = hlo.collectives(spread(lambda x: f(x, "data")).lower(x).compile().as_text())
    want = collectives.traffic(name, x[0].nbytes, N)
    assert sum(m.sent(i) for m in moves for i in range(N)) == want.total
    assert max(sum(m.sent(i) for m in moves) for i in range(N)) == want.sent
    assert max(sum(m.received(i) for m in moves) for i in range(N)) == want.received


def test_a_server_and_all_reduce_update_alike():
    """Three steps of a linear model, the same batch: equal parameters, other bytes."""
    rng = np.random.default_rng(1)
    w, inputs, targets = rng.normal(size=(6, 4)), rng.normal(size=(N, 5, 6)), rng.normal(size=(N, 5, 4))
    w, inputs, targets = (np.float32(a) for a in (w, inputs, targets))
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    mesh = make_mesh({"data": N})

    def run(update):
        def local(w, x, y):
            for _ in range(3):
                w = update(w, jax.grad(loss)(w, x[0], y[0]))
            return w[None]

        specs = (P(), P("data"), P("data"))
        f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False))
        moves = hlo.collectives(f.lower(w, inputs, targets).compile().as_text())
        return np.asarray(f(w, inputs, targets)), [sum(m.received(i) for m in moves) / 3 for i in range(N)]

    alike, each = run(lambda w, g: w - 0.1 * collectives.all_reduce_mean(g, "data"))
    served, uneven = run(lambda w, g: collectives.pull(w - 0.1 * collectives.push(g, "data"), "data"))
    whole = w
    for _ in range(3):
        whole = whole - 0.1 * jax.grad(loss)(whole, inputs.reshape(-1, 6), targets.reshape(-1, 4))
    for device in range(N):
        np.testing.assert_allclose(alike[device], whole, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(served[device], whole, rtol=1e-6, atol=1e-7)
    assert each == [2 * w.nbytes * (N - 1) / N] * N
    assert uneven == [w.nbytes * (N - 1)] + [w.nbytes] * (N - 1)


def test_who_holds_what():
    mesh = make_mesh({"data": 3}, jax.devices()[:3])
    tables = {name: collectives.table(name, mesh, "data").splitlines() for name in collectives.COLLECTIVES}
    assert tables["broadcast"][2] == "2  2a 2b 2c  ->  0a 0b 0c"
    assert tables["reduce"][:2] == ["0  0a 0b 0c  ->  012a 012b 012c", "1  1a 1b 1c  ->  - - -"]
    assert tables["all_reduce"][1] == "1  1a 1b 1c  ->  012a 012b 012c"
    assert tables["reduce_scatter"][1] == "1  1a 1b 1c  ->  012b"
    assert tables["all_gather"] == [f"{i}  {i}{'abc'[i]}  ->  0a 1b 2c" for i in range(3)]
    assert tables["all_to_all"][2] == "2  2a 2b 2c  ->  0c 1c 2c"


def test_an_unknown_name():
    with pytest.raises(ValueError, match="collective='gossip' is not one of all_reduce, "):
        collectives.traffic("gossip", 1, 2)


def test_a_broadcast_is_as_deep_as_its_tree():
    assert [collectives.traffic("broadcast", 8, n).sent for n in (1, 2, 5, 8)] == [0, 8, 24, 24]
