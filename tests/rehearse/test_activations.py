"""Bytes kept by policy: what a block's inputs and products take, in closed form, and what the compiler then needs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import abstract

from llm_jax.models.llama import LlamaConfig
from llm_jax.nn.execution import Execution
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.parallel.plan import PlanConfig
from llm_jax.rehearse.activations import residual_bytes
from llm_jax.training.run_config import RunConfig

L, D, F, V, B, T = 6, 32, 64, 64, 2, 16
MODEL = LlamaConfig(
    vocab_size=V, context_length=T, model_dim=D, num_layers=L, num_heads=4, num_kv_heads=4, hidden_dim=F, tied=False
)
STATE = B * T * D * 4  # bytes of one layer's residual stream


@functools.cache
def of(remat, layers=L, precision="fp32"):
    model = dataclasses.replace(MODEL, num_layers=layers)
    config = RunConfig(model, plan=PlanConfig(data=1, precision=precision))
    params, _ = abstract(model.make(), np.zeros((1, T), np.int32))
    batch = {"input_ids": jax.ShapeDtypeStruct((B, T + 1), np.int32)}
    return residual_bytes(config, CausalLM(chunks=1), params, batch, Execution(remat=remat))


def per_layer(remat, **options):
    """What one more layer adds."""
    more, less = of(remat, L + 1, **options), of(remat, L, **options)
    return {place: more[place] - less[place] for place in more}


@pytest.mark.parametrize(
    "remat, device, host",
    [
        ("full", 1, 0),  # the block's input
        ("names:attention", 2, 0),
        ("names:attention,mlp", 2, 0),  # nobody reads what is added last
        ("offload:block", 0, 1),
        ("offload:block,attention", 0, 2),
    ],
)
def test_policies_keep_what_they_name(remat, device, host):
    assert per_layer(remat) == {"device": device * STATE, "host": host * STATE}


def test_less_is_kept_the_more_is_recomputed():
    """Without a policy the inputs of norms, products and attention; with `dots` what products give; and means."""
    means = 2 / D
    kept = [per_layer(remat)["device"] / STATE for remat in ("none", "dots", "full")]
    assert kept == [12 + means, 9 + means, 1]


def test_half_precision_keeps_half():
    assert per_layer("full", precision="bf16")["device"] == STATE // 2 + halves()


def halves():
    """Copies of a layer's kernels in half precision, which are kept as well."""
    return 2 * (4 * D * D + 3 * D * F + 2 * D)
