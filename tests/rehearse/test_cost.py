"""The cost model against what compiled steps move: bytes by mesh axis, on eight CPU devices."""

import functools

import jax
import numpy as np
import pytest

from llm_jax.models.llama import LlamaConfig
from llm_jax.parallel import chips
from llm_jax.parallel.pipeline.schedules import turn_shares
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.rehearse import hlo
from llm_jax.rehearse.cost import Cost, estimate
from llm_jax.training.loop import LoopConfig
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig

MODEL = LlamaConfig(
    vocab_size=512,
    context_length=64,
    model_dim=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    hidden_dim=128,
    tied=False,
)
ROWS, T = 16, 64


@functools.cache
def both(plan_config, accumulation=1):
    """(estimate, {axes: mean bytes that a device sends in the compiled step})."""
    training = LoopConfig(batch_size=ROWS, sequence_length=T, steps=3, accumulation=accumulation)
    config = RunConfig(MODEL, plan=plan_config, training=training)
    plan = Plan(plan_config, MODEL)
    program = build(config, plan, 0)
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    batch = {"input_ids": described(np.zeros((ROWS, T + 1), np.int32), plan.batch_sharding())}
    text = program.step.lower(jax.tree.map(described, program.shapes, program.shardings), batch).compile().as_text()
    shares = None if plan.schedule is None else turn_shares(plan.schedule)
    sent = {}
    for c in hlo.collectives(text, shares):
        axes = "+".join(hlo.axes_of(c.groups, plan.mesh))
        sent[axes] = sent.get(axes, 0) + sum(c.sent(d) for d in range(8)) / 8
    return estimate(config, plan, program, kept=800.0), sent


@pytest.mark.parametrize(
    "plan, accumulation",
    [
        (PlanConfig(data=8), 1),
        (PlanConfig(data=8, zero=2), 2),
        (PlanConfig(data=8, zero=3, remat="names:attention"), 1),
        (PlanConfig(data=8, zero=3, explicit=True, remat="full"), 1),
    ],
    ids=["data", "zero 2, accumulation", "zero 3", "explicit"],
)
def test_what_data_parallelism_moves_is_exact(plan, accumulation):
    cost, sent = both(plan, accumulation)
    assert cost.sent.keys() == {"data"}
    assert sent["data"] == pytest.approx(cost.sent["data"], rel=2e-3)  # and the loss


def test_rings_and_sums_of_a_divided_sequence():
    cost, sent = both(PlanConfig(data=2, seq=4))
    for axes in ("data", "data+seq"):
        assert sent[axes] == pytest.approx(cost.sent[axes], rel=2e-3)
    assert sent["seq"] == pytest.approx(cost.sent["seq"], rel=0.1)


def test_tensor_parallelism_within_two_fifths():
    """XLA gathers some activations twice, and turns some round by all-to-all.

    XLA:CPU sums the gradients of the inputs of query, key and value, and of gate and up, one by one; a TPU's compiler
    adds them before.
    """
    cost, sent = both(PlanConfig(data=2, model=4))
    one_by_one = 4 * 3 * (2 * 3 / 4) * (ROWS / 2 * T * 64 * 4)  # layers, sums more, sent of one, its bytes
    want = cost.sent["model"] + one_by_one
    assert want <= sent["model"] <= 1.4 * want


def test_pipelines_exchange_what_is_said():
    cost, sent = both(PlanConfig(data=4, pipe=2))
    assert cost.kept == 800 * 2 / 8  # two micro-batches alive at once
    assert sent["pipe"] == pytest.approx(cost.sent["pipe"], rel=0.02)
    assert cost.idle == 1 / 5  # (p - 1) / (m + p - 1)


def test_stages_gather_layers_in_every_turn():
    cost, sent = both(PlanConfig(data=4, pipe=2, zero=3))
    assert sent["data"] == pytest.approx(cost.sent["data"], rel=0.05)


def test_replicas():
    cost, sent = both(PlanConfig(replica=2, data=4, zero=2))
    assert sum(sent.values()) == pytest.approx(sum(cost.sent.values()), rel=0.1)


def test_flops_bytes_and_seconds():
    cost, _ = both(PlanConfig(data=8))
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128) + 512 * 64
    norms = (2 * 4 + 1) * 64
    assert cost.flops == ROWS * T / 8 * (6 * matrices + 12 * 4 * T * 64)
    assert cost.held["parameters"] == 4 * (matrices + norms + 512 * 64) and cost.kept == 100
    chip = chips.Chip("", flops=100.0, links=10.0)
    assert Cost(200.0, {}, 0, {"data": 5.0}, 0.0).seconds(chip) == (2.0, 2.5)
    assert Cost(200.0, {}, 0, {"data": 50.0}, 0.5).seconds(chip) == (5.0, 9.0)
