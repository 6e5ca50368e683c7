import jax
import numpy as np
import pytest

from llm_jax.training.precision import LossScale, Precision


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


@pytest.mark.parametrize(
    "fields, words",
    [({"compute": "fp8"}, "precision='fp8' is none of fp32, bf16, fp16"), ({"master": "nowhere"}, "master='nowhere'")],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        Precision(**fields)
