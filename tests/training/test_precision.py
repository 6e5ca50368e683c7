import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.training.precision import LossScale, Precision, round_at_random
from llm_jax.training.state import init_state


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    @jax.jit
    def run(finite):
        start = Precision("fp16", initial_scale=8.0, growth_interval=3).init_scale()
        step = lambda s, ok: (s.update(ok), (s.update(ok).scale, s.update(ok).good_steps))
        return jax.lax.scan(step, start, finite)[1]

    finite = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    scale, good = run(np.array(finite, bool))
    assert scale.tolist() == [8, 8, 16, 8, 8, 8, 4, 2, 1, 1, 1, 1, 1, 1, 2, 2]  # never below 1
    assert good.tolist() == [1, 2, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0, 1]


def test_loss_scale_has_a_ceiling():
    full = LossScale(np.float32(2.0**24), np.int32(0), 1)
    assert float(full.update(np.bool_(True)).scale) == 2.0**24


def test_only_fp16_scales():
    assert Precision("bf16").init_scale() is None and Precision("fp32").init_scale() is None


def test_rounding_at_random_is_right_on_average():
    x = np.float32([1.0, -2.5, 0.0, 1.001, -3.3e-5, 7e4, np.inf, np.nan])
    draws = jax.jit(jax.vmap(lambda key: round_at_random(x, key)))(jax.random.split(jax.random.key(0), 20_000))
    got = np.asarray(draws.astype(jnp.float32))
    np.testing.assert_array_equal(got[:, [0, 1, 2, 6, 7]], np.broadcast_to(x[[0, 1, 2, 6, 7]], (20_000, 5)))
    for i in (3, 4, 5):
        below, above = np.unique(got[:, i])  # its neighbours
        share = (x[i] - below) / (above - below)
        assert abs((got[:, i] == above).mean() - share) < 4 * np.sqrt(share * (1 - share) / 20_000)


def test_small_updates_die_without_a_master_copy_and_live_by_chance():
    """1e-4 added 1,000 times to 1: nothing in bfloat16, 0.1 on average by random rounding."""
    start = jnp.ones(400, jnp.bfloat16)
    add = lambda w, _: (w + jnp.bfloat16(1e-4), None)
    chance = lambda w, key: (round_at_random(w.astype(jnp.float32) + np.float32(1e-4), key), None)
    plain = jax.lax.scan(add, start, length=1000)[0]
    rounded = jax.lax.scan(chance, start, jax.random.split(jax.random.key(0), 1000))[0]
    assert (plain == 1).all()
    assert abs(float(rounded.astype(jnp.float32).mean()) - 1.1) < 0.005


@pytest.mark.parametrize("precision, words", [
    (Precision(), ["parameters    float32 (24 B)", "products      float32", "master copy   the parameters",
                   "optimizer     float32 (48 B)"]),
    (Precision("bf16"), ["parameters    float32 (24 B)", "gradients     bfloat16", "cast in every step"]),
    (Precision("fp16", "in_optimizer"), ["parameters    float16 (12 B)", "master copy   float32 (24 B), beside",
                                         "optimizer     float32 (48 B)", "loss scale    dynamic"]),
    (Precision("bf16", "none"), ["parameters    bfloat16 (12 B)", "master copy   none: updates are rounded at random",
                                 "optimizer     float32 (48 B)"]),
])  # fmt: skip
def test_describe_says_what_is_held(precision, words):
    params = {"w": np.zeros((2, 3), np.float32)}
    first = lambda: init_state(params, optax.adam(1e-3), jax.random.key(0), precision)
    text = precision.describe(jax.eval_shape(first))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"compute": "fp8"}, "precision='fp8' is not one of fp32, bf16, fp16"),
        ({"master": "nowhere"}, "master='nowhere'"),
        ({"master": "none"}, "master=none needs precision=bf16, not fp32"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        Precision(**fields)
