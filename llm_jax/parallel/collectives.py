"""The collectives: who holds what before and after, and how many bytes that moves.

Functions of what one device holds, to be called inside `shard_map` over a mesh axis of N devices. Blocks are cut along
the leading dimension. The compiler chooses the algorithm of four of them (`lax.psum` and its kin); `broadcast` and
`reduce`, which single-program JAX has no words for, are binomial trees of permutations. `traffic` counts a ring's bytes
for the four, and for the two the tree's: the least in total, though a root's own share can be smaller.

Two ways to sum gradients are built from them: all devices alike (`all_reduce_mean`), and a parameter server
(`push`, `pull`). Their results are equal; the server's link carries N / 2 times the bytes.

Sources: Thakur, Rabenseifner, Gropp 2005, https://doi.org/10.1177/1094342005051521; Li et al. 2014 (parameter server),
https://www.usenix.org/conference/osdi14/technical-sessions/presentation/li_mu.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def _from_root(axis: str, root: int) -> tuple[int, jax.Array]:
    """(number of devices, this device's distance from the root)."""
    n = jax.lax.axis_size(axis)
    return n, (jax.lax.axis_index(axis) - root) % n


def _rounds(n: int, root: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """The binomial tree: in the round of distance d, the first d devices from the root send to those d further on."""
    at = lambda i: (root + i) % n
    steps = [2**r for r in range(math.ceil(math.log2(n)))]
    return [(d, [(at(i), at(i + d)) for i in range(min(d, n - d))]) for d in steps]


def broadcast(x: jax.Array, axis: str, root: int = 0) -> jax.Array:
    """Broadcast: every device gets the root's `x`."""
    n, distance = _from_root(axis, root)
    for d, pairs in _rounds(n, root):
        got = jax.lax.ppermute(x, axis, pairs)
        x = jnp.where((distance >= d) & (distance < 2 * d), got, x)
    return x


def reduce(x: jax.Array, axis: str, root: int = 0) -> jax.Array:
    """Reduce: the root gets the sum, the other devices zeros."""
    n, distance = _from_root(axis, root)
    for _, pairs in reversed(_rounds(n, root)):
        x = x + jax.lax.ppermute(x, axis, [(to, frm) for frm, to in pairs])
    return jnp.where(distance == 0, x, jnp.zeros_like(x))


def all_reduce(x: jax.Array, axis: str) -> jax.Array:
    """All-reduce: every device gets the sum."""
    return jax.lax.psum(x, axis)


def reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    """Reduce-scatter: device i gets block i of the sum."""
    return jax.lax.psum_scatter(x, axis, tiled=True)


def all_gather(x: jax.Array, axis: str) -> jax.Array:
    """Everyone has everyone's blocks, in the order of the devices."""
    return jax.lax.all_gather(x, axis, tiled=True)


def all_to_all(x: jax.Array, axis: str) -> jax.Array:
    """All-to-all: device i gets block i of every device."""
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


COLLECTIVES: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f for f in (broadcast, reduce, all_reduce, reduce_scatter, all_gather, all_to_all)
}


def all_reduce_mean(gradient: jax.Array, axis: str) -> jax.Array:
    """Data parallelism without a server: everyone has the mean gradient and updates its own copy."""
    return jax.lax.psum(gradient, axis) / jax.lax.axis_size(axis)


def push(gradient: jax.Array, axis: str, server: int = 0) -> jax.Array:
    """Workers send their gradients to the server, one link each; it has the mean, the others zeros."""
    n, distance = _from_root(axis, server)
    total = gradient
    for i in range(1, n):
        total = total + jax.lax.ppermute(gradient, axis, [((server + i) % n, server)])
    return jnp.where(distance == 0, total / n, jnp.zeros_like(gradient))


def pull(params: jax.Array, axis: str, server: int = 0) -> jax.Array:
    """Workers fetch the server's parameters, one link each."""
    n, distance = _from_root(axis, server)
    for i in range(1, n):
        got = jax.lax.ppermute(params, axis, [(server, (server + i) % n)])
        params = jnp.where(distance == i, got, params)
    return params


class Traffic(NamedTuple):
    """Bytes that one call moves.

    Attributes:
      sent: bytes of the device that sends most.
      received: bytes of the device that receives most.
      total: bytes that all devices send.
    """

    sent: float
    received: float
    total: float


def traffic(name: str, size: float, n: int) -> Traffic:
    """What a collective moves among N devices.

    Args:
      name: a key of `COLLECTIVES`, or `push`, `pull`.
      size: bytes that one device puts in (`all_gather`: its own block; `reduce_scatter`: all blocks).
      n: devices along the axis.

    Raises:
      ValueError: for an unknown name.
    """
    depth = math.ceil(math.log2(n))
    alike = {
        "all_reduce": 2 * size * (n - 1) / n,  # reduce_scatter, then all_gather of the blocks
        "reduce_scatter": size * (n - 1) / n,
        "all_gather": size * (n - 1),
        "all_to_all": size * (n - 1) / n,
    }
    if name in alike:
        return Traffic(alike[name], alike[name], alike[name] * n)
    link = size if n > 1 else 0
    rooted = {
        "broadcast": Traffic(size * depth, link, size * (n - 1)),
        "reduce": Traffic(link, size * depth, size * (n - 1)),
        "push": Traffic(link, size * (n - 1), size * (n - 1)),
        "pull": Traffic(size * (n - 1), link, size * (n - 1)),
    }
    if name not in rooted:
        raise ValueError(f"collective={name!r} is not one of {', '.join((*alike, *rooted))}")
    return rooted[name]


def holdings(name: str, mesh: Mesh, axis: str) -> tuple[list[list[str]], list[list[str]]]:
    """Who holds what, found by running the collective.

    Args:
      name: a key of `COLLECTIVES`.
      mesh: at most 16 devices along `axis`.
      axis: its axis.

    Returns:
      (before, after), a list of blocks for every device. A block reads `02b`: block b, summed over devices 0 and 2
      (hexadecimal digits); `-` is a block of zeros.
    """
    n = mesh.shape[axis]
    blocks = np.arange(n)[:, None] if name == "all_gather" else np.tile(np.arange(n), (n, 1))
    whose = np.broadcast_to(2 ** np.arange(n)[:, None], blocks.shape)
    run = jax.jit(
        jax.shard_map(
            lambda x: COLLECTIVES[name](x[0], axis)[None],
            mesh=mesh,
            in_specs=P(axis),
            out_specs=P(axis),
            check_vma=False,
        )
    )

    def read(summed: np.ndarray, whose: np.ndarray) -> list[list[str]]:
        def label(block: int, bits: int) -> str:
            devices = [i for i in range(n) if bits >> i & 1]
            return "".join(f"{i:x}" for i in devices) + "abcdefghijklmnop"[block // len(devices)] if devices else "-"

        return [[label(int(b), int(w)) for b, w in zip(*row, strict=True)] for row in zip(summed, whose, strict=True)]

    return read(blocks, whose), read(np.asarray(run(blocks)), np.asarray(run(whose)))


def table(name: str, mesh: Mesh, axis: str) -> str:
    """`holdings` as text: a line a device."""
    rows = [(" ".join(a), " ".join(b)) for a, b in zip(*holdings(name, mesh, axis), strict=True)]
    width = max(len(a) for a, _ in rows)
    return "\n".join(f"{i}  {a:<{width}}  ->  {b}" for i, (a, b) in enumerate(rows))
