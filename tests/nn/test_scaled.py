"""A factor of a whole tensor is multiplied in float32 and rounded once, in every place that has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress.quantize import Quantized
from llm_jax.delta.lora import Lora
from llm_jax.nn import weights
from llm_jax.nn.attend import Mask, attend, drop, scores
from llm_jax.nn.embedding import Embedding

FACTOR = 1 + 0.99 * 2**-8  # bfloat16 makes it 1.0
NUMBERS = np.arange(1, 128, dtype=np.float32)  # exact in bfloat16
ROW = jnp.asarray(NUMBERS[None], jnp.bfloat16)
COLUMN = jnp.asarray(NUMBERS[:, None], jnp.bfloat16)
ONE = jnp.ones((1, 1), jnp.bfloat16)
BYTES, SCALE = jnp.asarray(NUMBERS[None], jnp.int8), jnp.full((1, 127), FACTOR, jnp.float32)
LORA = dict(base=jnp.zeros((1, 127), jnp.bfloat16), a=ONE, b=ROW, scale=FACTOR)
PLACES = {
    "scaled": lambda: weights.scaled(ROW, FACTOR),
    "scaled by an array": lambda: weights.scaled(ROW, SCALE[0]),
    "int8 by column": lambda: weights.matmul(ONE, Quantized(BYTES, SCALE)),
    "int8 by column, transposed": lambda: weights.matmul_t(ROW, Quantized(jnp.eye(127, dtype=jnp.int8), SCALE)),
    "int8 by row, transposed": lambda: weights.matmul_t(ONE, Quantized(BYTES.T, SCALE.T)),
    "lora": lambda: weights.matmul(ONE, Lora(**LORA)),
    "lora, transposed": lambda: weights.matmul_t(ONE, Lora(LORA["base"].T, ROW.T, ONE, FACTOR)),
    "lora, rows": lambda: weights.take(Lora(**LORA), jnp.zeros(1, int)),
    "lora, merged": lambda: weights.dense(Lora(**LORA)),
    "attention": lambda: scores(COLUMN[None, :, None], ONE[None, None], None, None, None, FACTOR)[0].reshape(1, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_factor_is_not_rounded_itself(name):
    want = np.asarray(jnp.asarray(NUMBERS[None] * np.float32(FACTOR), jnp.bfloat16), np.float32)
    assert (want != NUMBERS).sum() > 60
    np.testing.assert_array_equal(np.asarray(PLACES[name](), np.float32), want)


def test_what_dropout_keeps_is_divided_in_float32():
    kept = np.asarray(drop(ROW, 0.1, jax.random.key(0)), np.float32)[0]
    want = np.asarray(jnp.asarray(NUMBERS / np.float32(0.9), jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(kept[kept > 0], want[kept > 0])
    assert (kept > 0).sum() > 90


def test_embeddings_times_the_root_of_their_width():
    table = jnp.asarray(np.tile(NUMBERS[:, None], (1, 7)), jnp.bfloat16)
    rows = Embedding(127, 7, scale=True).apply({"params": {"embedding": table}}, np.arange(127))
    want = jnp.asarray(NUMBERS * np.float32(np.sqrt(7)), jnp.bfloat16)
    np.testing.assert_array_equal(rows[:, 0], want)
    assert (want != jnp.asarray(NUMBERS, jnp.bfloat16) * jnp.asarray(np.sqrt(7), jnp.bfloat16)).any()


def test_distances_above_256_are_not_rounded():
    """Two keys 300 and 301 tokens away: their weights differ by the slope."""
    q, keys = np.zeros((1, 1, 1, 8), jnp.bfloat16), np.zeros((1, 2, 1, 8), jnp.bfloat16)
    values = np.asarray(np.eye(2, 8)[None, :, None], jnp.bfloat16)
    mask, slopes = Mask(np.array([[301]]), np.array([[0, 1]])), np.full((1,), 0.5, np.float32)
    run = functools.partial(attend, mask=mask, scale=1.0, slopes_N=slopes, implementation="fused")
    out = jax.jit(run)(q, keys, values)
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, 0, 0, 0], 1 / (1 + np.exp(0.5)), rtol=2**-8)
