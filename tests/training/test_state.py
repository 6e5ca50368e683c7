"""What a state holds, in which dtype, and how many bytes a parameter that makes."""

import jax
import numpy as np
import optax
import pytest

from llm_jax.nn import weights
from llm_jax.training.precision import Precision
from llm_jax.training.state import init_state

PARAMS = {"a": jax.ShapeDtypeStruct((100,), "float32"), "b": jax.ShapeDtypeStruct((60,), "float32")}


def state_of(precision=Precision(), **options):
    make = lambda p: init_state(p, optax.scale_by_adam(), jax.random.key(0), precision, **options)
    return jax.eval_shape(make, PARAMS)


@pytest.mark.parametrize(
    "compute, master, stored, kept, size",
    [
        ("fp32", "in_params", "float32", None, 12),
        ("fp32", "in_optimizer", "float32", None, 12),  # they are their own master
        ("bf16", "in_params", "float32", None, 12),
        ("bf16", "in_optimizer", "bfloat16", "float32", 14),  # 16 with gradients
        ("fp16", "in_params", "float32", None, 12),
        ("fp16", "in_optimizer", "float16", "float32", 14),
    ],
)
def test_dtypes_and_bytes(compute, master, stored, kept, size):
    state = state_of(Precision(compute, master))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(stored)}
    assert {x.dtype for x in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu))} == {np.dtype("float32")}
    assert {x.dtype.name for x in jax.tree.leaves(state.master)} == ({kept} if kept else set())
    assert weights.bytes_of((state.params, state.opt_state, state.master)) == size * 160 + 4
    assert (state.loss_scale is None) == (compute != "fp16")


def test_what_is_frozen_has_no_state():
    state = state_of(Precision("bf16", "in_optimizer"), trainable=("a",), ema=True)
    for tree in (state.opt_state.mu, state.opt_state.nu, state.master, state.average):
        assert tree["b"] is None and tree["a"].shape == (100,) and tree["a"].dtype == "float32"
    assert state.params["b"].dtype == "bfloat16"


def test_no_average_unless_asked_for():
    assert state_of().average is None and state_of().carry is None
