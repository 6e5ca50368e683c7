"""Ring attention on eight devices against the reference: outputs, gradients, what travels, who works how much."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attend import Mask, attend
from llm_jax.parallel import ring
from llm_jax.parallel.mesh import make_mesh
from llm_jax.rehearse import hlo

B, T, H = 2, 32, 4
RNG = np.random.default_rng(0)
INDEX = np.broadcast_to(np.arange(T), (B, T)).astype(np.int32)
DOCUMENTS = np.sort(RNG.integers(0, 3, (B, T))).astype(np.int32)
PADDED = np.where(np.arange(T) < np.array([[T], [T // 3]]), INDEX, -1).astype(np.int32)  # whole stretches of padding
MASKS = {
    "everything": None,
    "causal": Mask(INDEX, INDEX, ordered=True),
    "window": Mask(INDEX, INDEX, window=9, ordered=True),
    "documents": Mask(INDEX, INDEX, DOCUMENTS, DOCUMENTS),
    "padding": Mask(INDEX, PADDED, causal=False),
    "causal, padding in front": Mask(INDEX, PADDED[:, ::-1].copy()),
    "one row of positions": Mask(INDEX[:1], INDEX[:1]),
}


def kernel_on(sizes, rows=("data",), heads="model", chunk=3):
    """The kernel on so many devices, in chunks of 2: of 3 no more divides a half of a stretch."""
    count = math.prod(sizes.values())
    return ring.Ring(make_mesh(sizes, jax.devices()[:count]), rows, heads, sequence="seq", chunk=chunk)


def arrays(n, k, dtype=np.float32, keys=T):
    rng = np.random.default_rng(n)
    make = lambda t, count: jnp.asarray(rng.normal(size=(B, t, count, H)), dtype)
    return make(T, n), make(keys, k), make(keys, k)


def run(operands, mask, slopes=None, **how):
    """(output, gradients)."""
    weight = jnp.cos(jnp.arange(operands[0].size, dtype=operands[0].dtype)).reshape(operands[0].shape)

    def loss(*operands):
        out = attend(*operands, mask, scale=H**-0.5, slopes_N=slopes, **how)
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*operands)
    return out, *grads


@functools.cache
def reference(name):
    return run(arrays(4, 2), MASKS[name], implementation="reference")


def both(kernel, operands, mask, slopes=None):
    """(output, gradients) through the kernel, and by the reference."""
    how = {"kernel": kernel}, {"implementation": "reference"}
    return zip(*(run(operands, mask, slopes, **h) for h in how), strict=True)


@pytest.mark.parametrize("sizes", [{"data": 2, "seq": 2, "model": 2}, {"data": 1, "seq": 8}], ids=["2 of 8", "8"])
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_reference(name, sizes):
    kernel = kernel_on(sizes, ("replica", "data"))
    operands, mask = arrays(4, 2), MASKS[name]
    assert kernel.fits(*operands[:2], mask, False, False)
    for got, want in zip(run(operands, mask, kernel=kernel), reference(name), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_slopes_cross_attention_and_float64():
    kernel = kernel_on({"data": 2, "seq": 2, "model": 2})
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    for got, want in both(kernel, arrays(4, 4), MASKS["causal"], slopes):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    source = Mask(INDEX, PADDED[:, :20].copy(), causal=False)
    for got, want in both(kernel, arrays(4, 2, keys=20), source):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        for got, want in both(kernel, arrays(2, 2, np.float64), MASKS["causal"]):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_keys_travel_once_and_nothing_is_gathered():
    """Forward: P - 1 hops of the device's keys and values; the exchange of halves before and after."""
    p = 8
    kernel = kernel_on({"data": 1, "seq": p}, heads=None)
    operands = arrays(2, 2)
    mask = Mask(INDEX[:1], INDEX[:1], ordered=True)
    text = jax.jit(lambda *a: attend(*a, mask, scale=1.0, kernel=kernel)).lower(*operands).compile().as_text()
    found = hlo.collectives(text)
    assert {c.kind for c in found} == {"collective-permute"}
    stretch = B * T // p * 2 * H * 4
    places = B * T // p * 4  # positions, here the same of queries and keys
    hops = (p - 1) * (2 * stretch + places)
    assert sum(c.times * c.size for c in found) == hops + 4 * stretch + places


@pytest.mark.parametrize("chunk", [2, 512])
def test_what_a_causal_mask_hides_is_skipped(chunk):
    """Also where a chunk could hold a whole stretch, which has an early and a late half."""
    stretch = jnp.asarray([[0, 1, 2, 3, 28, 29, 30, 31]])
    keys = jnp.asarray([[4, 5, 6, 7, 24, 25, 26, 27]])
    seen = ring._over_chunks(
        lambda parts, i, j, part: (parts[0] + 1,), (jnp.zeros((1, 8)),), (("q", 1),), Mask(stretch, keys), chunk
    )
    size = min(chunk, 4)
    np.testing.assert_array_equal(seen[0], [[0] * 4 + [8 // size] * 4])


def test_work_is_balanced():
    """Under a causal mask every device computes as many chunks; stretches as they lie would differ by 2 P - 1."""
    p, stretch = 4, T // 4
    halves = np.arange(T).reshape(2 * p, -1)
    ways = ring._halves(p)
    held = [np.concatenate([halves[2 * a + i] for i in (0, 1) for a, b in ways[i] if b == d]) for d in range(p)]

    def work(held):
        chunks = [np.split(x, stretch // 2) for x in held]
        seen = lambda q, k: bool(ring._seen_at_all(Mask(*(jnp.asarray(x)[None] for x in (q, k)))))
        return [[sum(seen(q, k) for q in qs for k in ks) for ks in chunks] for qs in chunks]

    balanced, contiguous = work(held), work(np.split(np.arange(T), p))
    assert len({sum(row) for row in balanced}) == 1
    assert sum(map(sum, balanced)) == sum(map(sum, contiguous))
    assert sum(contiguous[-1]) > 5 * sum(contiguous[0])
    off = [balanced[d][(d - hop) % p] for d in range(p) for hop in range(1, p)]
    assert len(set(off)) == 1  # at every hop too: nobody waits


def test_memory_grows_with_the_stretch():
    """In a scan over layers: rows eight times as long on eight devices take the memory of one stretch on one."""

    def temporary(p, length):
        kernel = kernel_on({"data": 1, "seq": p}, heads=None)
        x = jax.ShapeDtypeStruct((1, length, 2, 16), np.float32)
        mask = Mask(*[np.arange(length, dtype=np.int32)[None]] * 2)
        layer = lambda x, _: (attend(x, x, x, mask, scale=1.0, kernel=kernel), None)
        loss = lambda x: jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, length=2)[0])
        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8, 8 * 512) < 3 * temporary(1, 512)


def test_what_does_not_fit_goes_another_way():
    kernel = kernel_on({"data": 2, "seq": 2, "model": 2})
    shape = lambda b, t, n: jax.ShapeDtypeStruct((b, t, n, H), np.float32)
    fits = lambda q, k, mask=None, biased=False: kernel.fits(shape(*q), shape(*k), mask, False, biased)
    assert fits((2, 8, 4), (2, 6, 2))
    assert not fits((3, 8, 4), (3, 8, 2))  # rows
    assert not fits((2, 7, 4), (2, 7, 2))  # stretches
    assert not fits((2, 8, 4), (2, 8, 1))  # heads
    assert not fits((2, 8, 4), (2, 8, 2), biased=True)
    assert not fits((2, T, 4), (2, T, 2), Mask(INDEX, INDEX, allowed_BTS=np.ones((B, T, T), bool)))
