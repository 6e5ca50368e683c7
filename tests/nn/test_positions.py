"""Positions against closed forms written here independently."""

import math

import jax
import numpy as np
import pytest

from llm_jax.nn import positions
from llm_jax.nn.positions import RotaryScaling, rotary_frequencies


def test_sinusoids():
    table = positions.sinusoids(20, 7)
    assert table.dtype == np.float32 and table.shape == (20, 7)
    for p in (0, 3, 19):
        for i in range(7):
            angle = p / 10000 ** (2 * (i // 2) / 7)
            assert table[p, i] == pytest.approx((math.sin, math.cos)[i % 2](angle), abs=1e-6)


@pytest.mark.parametrize("offset", [1, 4, 9])
def test_products_of_sinusoids_depend_on_the_offset_only(offset):
    table = positions.sinusoids(30, 8).astype(np.float64)
    products = np.sum(table[:-offset] * table[offset:], axis=1)
    want = sum(math.cos(offset / 10000 ** (2 * i / 8)) for i in range(4))
    np.testing.assert_allclose(products, want, atol=1e-5)


def frequencies(head_dim, theta, s=None):
    """One frequency at a time, by wavelength (llama3) and by rotations (yarn)."""
    out = []
    for i in range(head_dim // 2):
        f = 1 / theta ** (2 * i / head_dim)
        if s is not None and s.kind == "linear":
            f = f / s.factor
        elif s is not None and s.kind == "llama3":
            wavelength = 2 * math.pi / f
            if wavelength > s.original_length / s.low_freq_factor:
                f = f / s.factor
            elif wavelength > s.original_length / s.high_freq_factor:
                smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                f = (1 - smooth) * f / s.factor + smooth * f
        elif s is not None and s.kind == "yarn":
            # the dimension that makes r rotations over the original context: L f = 2 pi r
            border = [
                math.log(s.original_length / (2 * math.pi * r)) / math.log(theta) * head_dim / 2
                for r in (s.beta_fast, s.beta_slow)
            ]
            if s.truncate:
                border = [math.floor(border[0]), math.ceil(border[1])]
            low, high = max(border[0], 0), min(border[1], head_dim - 1)
            stretched = 1.0 if i >= high else 0.0 if i <= low else (i - low) / (high - low)
            f = f * ((1 - stretched) + stretched / s.factor)
        out.append(f)
    return out


SCALINGS = {
    "none": None,
    "linear": RotaryScaling("linear", 2.5),
    "llama3": RotaryScaling("llama3", 8.0, original_length=64),
    "yarn": RotaryScaling("yarn", 4.0, original_length=512, beta_fast=8.0),
    "yarn exact": RotaryScaling("yarn", 4.0, original_length=512, truncate=False, attention_factor=1.5),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies(name):
    scaling = SCALINGS[name]
    freq, factor = rotary_frequencies(16, 1000.0, scaling)
    np.testing.assert_allclose(freq, frequencies(16, 1000.0, scaling), rtol=1e-12)
    wanted = {"yarn": 0.1 * math.log(4.0) + 1, "yarn exact": 1.5}.get(name, 1.0)
    assert factor == pytest.approx(wanted, rel=1e-12)
    if name in ("llama3", "yarn"):  # the row reaches all three branches
        ratio = freq / rotary_frequencies(16, 1000.0)[0]
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / scaling.factor)
        assert ((ratio < 0.99) & (ratio > 1.01 / scaling.factor)).any()


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-10)])
def test_rotation_is_complex_multiplication(dtype, bound):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        freq, _ = rotary_frequencies(8, 100.0)
        at = np.array([[0, 1, 5, 9], [3, 3, 0, 2]])
        q, k = (rng.normal(size=(2, 4, 3, 8)).astype(dtype) for _ in range(2))

        @jax.jit
        def run(at, q, k):
            turn = lambda x, at: positions.rotate(x, positions.rotary_tables(at, freq, dtype=dtype))
            return turn(q, at), turn(k, at), turn(q, at + 7), turn(k, at + 7), positions.rotary_tables(at, freq, 2.0)

        q1, k1, q2, k2, tables = run(at, q, k)
        spin = np.exp(1j * at[:, :, None, None] * freq)
        z = (q[..., :4] + 1j * q[..., 4:]) * spin
        np.testing.assert_allclose(q1, np.concatenate([z.real, z.imag], -1), rtol=bound, atol=bound)
        np.testing.assert_allclose(np.sum(np.square(q1), -1), np.sum(q**2, -1), rtol=bound)
        scores = lambda q, k: np.einsum("btnh,bsnh->bnts", q, k)
        np.testing.assert_allclose(scores(q1, k1), scores(q2, k2), rtol=bound, atol=10 * bound)
        assert np.abs(scores(q1, k1) - scores(q, k)).max() > 0.1
        np.testing.assert_allclose(tables[0], 2 * np.cos(at[:, :, None] * freq), rtol=1e-5, atol=1e-5)


def test_alibi_slopes():
    np.testing.assert_allclose(positions.alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-7)
    extra = [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]  # every other slope of 16 heads
    np.testing.assert_allclose(positions.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + extra, rtol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match="even head_dim, got 7"):
        rotary_frequencies(7, 1e4)
    with pytest.raises(ValueError, match="kind='ntk' is not one of linear, llama3, yarn"):
        RotaryScaling("ntk", 2.0)
