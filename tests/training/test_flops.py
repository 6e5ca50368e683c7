"""Model FLOPs: by hand, and beside XLA's count of the gradient's program for every family and objective."""

import dataclasses

import counted_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ENCODERS, MODELS, V, model_params

from llm_jax.delta import lora
from llm_jax.nn import weights
from llm_jax.nn.stack import unstack
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.training import flops

D, L, T, ROWS = 12, 2, 7, 3
TOKENS = ROWS * T
IDS = {"input_ids": jax.ShapeDtypeStruct((ROWS, T + 1), np.int32)}


def causal(config, params=None, trainable=None):
    objective = CausalLM(chunks=1)
    return flops.of_step(config, objective, model_params(config) if params is None else params, IDS, trainable)


@pytest.mark.parametrize(
    "name, rows, layer",
    [
        ("gpt2", V, 4 * D * D + 2 * 4 * D * D),
        ("gpt_untied_padded", 32, 4 * D * D + 2 * 4 * D * D),  # of two tables only the head multiplies
        ("llama", V, D * 12 + 2 * D * 4 + 12 * D + 3 * D * 10),
    ],
)
def test_decoders_by_hand(name, rows, layer):
    """6 FLOPs a number of a matrix and token; 12 T A a layer for scores and values."""
    config = MODELS[name]
    width = config.num_heads * (getattr(config, "head_dim", None) or D // config.num_heads)
    found, attention = causal(config), 12 * L * T * width
    assert found == (TOKENS * (2 * (rows * D + L * layer) + attention / 3),
                     TOKENS * (6 * (rows * D + L * layer) + attention), TOKENS * attention)  # fmt: skip
    assert found.useful(causal=True) == TOKENS * (6 * (rows * D + L * layer) + attention / 2)
    assert causal(config, unstack(model_params(config))) == found


def test_a_shared_layer_counts_each_time_it_runs():
    config = dataclasses.replace(ENCODERS["albert"], num_layers=6, num_groups=1)
    batch = {"input_ids": jax.ShapeDtypeStruct((ROWS, T), np.int32)}
    count = lambda layers: (
        flops.of_step(
            *(c := dataclasses.replace(config, num_layers=layers), MaskedLM(pair=0.0, mask_id=3, vocab_size=V)),
            *(model_params(c), batch),
        ).total
    )
    assert count(6) - count(4) == count(4) - count(2) > 0


def test_a_frozen_base_costs_its_activations_gradients_only():
    config = dataclasses.replace(MODELS["gpt2"], num_layers=3)
    base = unstack(model_params(config))
    params = lora.attach(base, lora.LoraConfig(rank=2, targets=("mlp/*/kernel",)), jax.random.key(0))
    found = causal(config, params, lora.TRAINABLE)
    kernels, attention = 4 * D * D + 2 * 4 * D * D, 4 * T * D
    adapters, up = 2 * (2 * D + 2 * 4 * D), 4 * D * D  # of one layer
    # nothing before the first adapter has a gradient; that adapter's input has none either
    first = 2 * kernels + attention + 2 * (kernels - 4 * D * D - up) + 6 * adapters - 2 * 2 * D
    later = 4 * kernels + 3 * attention + 6 * adapters
    head = 4 * V * D
    assert found.total == TOKENS * (first + 2 * later + head)
    quantized = weights.replace(params, "attention/*/kernel", lambda path, w: jax.tree.map(jnp.int8, w))
    assert causal(config, quantized, lora.TRAINABLE).forward == found.forward


def test_loops_branches_and_stopped_gradients():
    x, w = jnp.ones((2, 4)), jnp.ones((4, 4))
    product = 2 * 2 * 4 * 4
    learns, reads = flops.Origin(learns=True), flops.Origin(reads=True)
    count = lambda fn: flops._count(fn, (w, x), [learns, reads])
    turns = lambda w, x: jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0]
    assert count(turns) == (5 * product, 15 * product, 0)  # what a turn leaves learns, in the first one too
    assert count(lambda w, x: jax.lax.stop_gradient(x @ w) @ w).total == 4 * product
    assert count(lambda w, x: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, x)).forward == product
    assert count(lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: (x @ w) @ w)).forward == 2 * product
    assert count(lambda w, x: (x @ w, x @ x.T)[1]).forward == 2 * 2 * 2 * 4  # what nobody reads is not computed
    assert count(jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w)).forward == 2 * product
    kernel, image = jnp.ones((3, 5, 6)), jnp.ones((2, 9, 5))
    slide = lambda k, x: jax.lax.conv_general_dilated(x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    assert flops._count(slide, (kernel, image), [learns, reads]).total == 2 * (2 * 2 * 7 * 6 * 3 * 5)


@pytest.mark.parametrize("name", counted_steps.STEPS)
def test_every_family_and_objective_beside_xla(name):
    """XLA's count has norms, masks and activations on top, and scores that are computed again."""
    found, lowered = counted_steps.counted(name)
    assert 0.9 < found.total / lowered.cost_analysis()["flops"] < 1


def test_the_peak_of_a_cpu_is_unknown():
    assert flops.peak_flops() is None
