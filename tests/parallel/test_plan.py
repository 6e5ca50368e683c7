"""Every plan equals one device after some optimizer steps: parameters, moments, losses, no leaf left out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from plan_runs import MODELS_HERE, TX, assert_equals_one_device, run_steps
from tiny_models import abstract

from llm_jax.models.transformer import TransformerConfig
from llm_jax.nn import paths, weights
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.optimizers import NAMES, OptimizerConfig, make_optimizer
from llm_jax.training.precision import Precision
from llm_jax.training.state import init_state

ROWS_OF_TABLE = {  # name: (plan, model, accumulation)
    "data 8": (PlanConfig(data=8), "gpt", 1),
    "tensor 2, zero 1": (PlanConfig(data=4, model=2, zero=1), "llama", 1),
    "tensor 4 with indivisible heads, zero 3": (PlanConfig(data=2, model=4, zero=3), "gpt", 1),
    "replicas, zero 2": (PlanConfig(replica=2, zero=2), "gpt", 1),
    "zero 3": (PlanConfig(data=8, zero=3, attention="chunked"), "llama", 1),
    "sequence 4, zero 3, update on the host": (
        PlanConfig(data=2, seq=4, zero=3, offload=("update",), remat="offload:block"),
        "llama",
        1,
    ),
    "accumulation, zero 2, remat, unrolled": (
        PlanConfig(data=4, model=2, zero=2, remat="full", unroll=True),
        "llama",
        2,
    ),
}
OTHER_ROWS = {  # not all that these store is divided; tests/parity/test_matrix.py has every model under every plan
    "sequence 2, tensor 2, optimizer on the host": (
        PlanConfig(data=2, seq=2, model=2, zero=1, offload=("optimizer",)),
        "gpt",
        1,
    ),
    "bert, sequence 2, zero 2, accumulation, unrolled": (PlanConfig(data=4, seq=2, zero=2, unroll=True), "bert", 2),
    "transformer, replicas, zero 1, accumulation": (PlanConfig(replica=2, zero=1), "transformer", 2),
    "xlnet with a memory, tensor 2, zero 2": (PlanConfig(data=4, model=2, zero=2), "xlnet", 1),
    "LoRA, 1f1b 2, zero 2": (PlanConfig(data=4, pipe=2, microbatches=2, zero=2), "lora", 1),
    "shared parameters, zero 3": (PlanConfig(data=8, zero=3), "shared", 1),
}


@functools.cache
def under(row):
    return run_steps(*{**ROWS_OF_TABLE, **OTHER_ROWS}[row])


def on_one_device(tree):
    """Bytes of a tree that device 0 holds."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("row", [*ROWS_OF_TABLE, *OTHER_ROWS])
def test_every_plan_equals_one_device(row):
    assert_equals_one_device(*under(row), {**ROWS_OF_TABLE, **OTHER_ROWS}[row][1])


# what tensor parallelism divides: all matrices of the llama, nothing of the attention whose heads do not divide
TENSOR = {
    "llama": ("kernel", "embedding"),
    "gpt": ("up/kernel", "up/bias", "down/kernel", "embed/embedding", "head/kernel"),
}


@pytest.mark.parametrize("row", ROWS_OF_TABLE)
def test_bytes_on_one_device(row):
    """Four bytes a parameter and eight a pair of moments, divided as the table's row says, to the byte."""
    config, name, _ = ROWS_OF_TABLE[row]
    state, _ = under(row)
    data = 8 // (config.model * config.replica)  # with the axis of the sequence
    divided = paths.matcher(TENSOR[name])
    sizes = [x.size / (config.model if divided(p) else 1) for p, x in paths.flatten(state.params)]
    counters = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim == 0)
    assert on_one_device(state.params) == 4 * sum(sizes) / (data if config.zero >= 3 else 1)
    assert on_one_device(state.opt_state) - counters == 8 * sum(sizes) / (data if config.zero >= 1 else 1)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("zero, bytes_of", [
    (0, lambda p, n: 16 * p), (1, lambda p, n: 4 * p + 12 * p / n), (2, lambda p, n: 2 * p + 14 * p / n),
    (3, lambda p, n: 16 * p / n),
])  # fmt: skip
def test_bytes_are_the_zero_papers(zero, bytes_of, n):
    """Half precision, its float32 master copy and Adam's moments in the optimizer state: table 1 of the paper."""
    config = dataclasses.replace(MODELS_HERE["llama"], vocab_size=32)
    params, axes = abstract(config.make(), np.zeros((1, 4), np.int32))
    precision = Precision("bf16", "in_optimizer")
    state = jax.eval_shape(lambda p: init_state(p, TX, jax.random.key(0), precision), params)
    plan = Plan(PlanConfig(data=n, zero=zero, precision="bf16", master="in_optimizer"), config, jax.devices()[:n])
    counters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state) if x.ndim == 0)
    held = plan.bytes_per_device(state, axes)
    assert sum(held.values()) - counters == bytes_of(weights.count(params), n)
    assert held["parameters"] == 2 * weights.count(params) / (n if zero == 3 else 1)


def make(model_config=MODELS_HERE["gpt"], **sizes):
    return Plan(PlanConfig(**sizes), model_config)


def test_heads_that_do_not_divide_are_replicated_and_said():
    assert make(model=4, data=2).notes == ["attention is replicated: 3 query and 3 key heads do not divide by model=4"]
    assert make(MODELS_HERE["llama"], model=2, data=4).notes == []
    uneven = TransformerConfig(num_heads=8, num_decoder_heads=2, model_dim=16)
    assert make(uneven, model=4, data=2).notes == [
        "attention is replicated: 8 query and 8 key heads, 2 in the decoder, do not divide by model=4"
    ]
    params, axes = abstract(MODELS_HERE["gpt"].make(), np.zeros((1, 4), np.int32))
    text = make(model=2, data=4, zero=3).describe(params, axes)
    assert "mesh {'data': 4, 'model': 2}, zero 3" in text and "attention is replicated: 3" in text
    lines = {line.split()[0]: line for line in text.splitlines()}
    # [2, 24, 16] over model=2 and data=4
    assert lines["decoder/layers/mlp/up/kernel"].endswith("(None, 'data', 'model')  384 B")
    odd = dataclasses.replace(MODELS_HERE["gpt"], vocab_pad_multiple=1)
    params, axes = abstract(odd.make(), np.zeros((1, 4), np.int32))
    text = make(odd, model=2, data=4).describe(params, axes)
    assert "(None, None)  2,976 B  vocab: 31 does not divide by model=2" in text


def test_what_is_frozen_has_no_state_and_no_sharding_of_one():
    config = MODELS_HERE["llama"]
    params, axes = abstract(config.make(), np.zeros((1, 4), np.int32))
    chosen = ("embed/embedding", "query/kernel")
    state = jax.eval_shape(lambda p: init_state(p, TX, jax.random.key(0), trainable=chosen), params)
    plan = make(config, data=4, model=2, zero=1)
    specs = {p: s.spec for p, s in paths.flatten(plan.state_shardings(state, axes))}
    moments = [p for p in specs if "/mu/" in p]
    assert sorted(p.split("/mu/")[1] for p in moments) == ["decoder/layers/attention/query/kernel", "embed/embedding"]
    assert specs[next(p for p in moments if p.endswith("query/kernel"))] == P(None, "data", "model")
    assert specs["params/decoder/layers/attention/query/kernel"] == P(None, None, "model")


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizers_state_is_divided(name):
    """Moments lie where their parameters' shards do; what is left whole has no dimension that four divides."""
    config = MODELS_HERE["llama"]
    params, axes = abstract(config.make(), np.zeros((1, 4), np.int32))
    tx = make_optimizer(OptimizerConfig(name, weight_decay=0.0 if name == "adam" else 0.1), 2)
    state = jax.eval_shape(lambda p: init_state(p, tx, jax.random.key(0), ema=True), params)
    plan = make(config, data=4, model=2, zero=3)
    shardings = plan.state_shardings(state, axes)
    stored = {p: s.spec for p, s in paths.flatten(shardings.params)}
    shapes = {p: x.shape for p, x in paths.flatten(params)}
    moments = 0
    for (path, s), x in zip(paths.flatten(shardings.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        owner = next((p for p in stored if path.endswith("/" + p) and shapes[p] == x.shape), None)
        moments += owner is not None
        if owner is not None:
            assert s.spec == stored[owner], path
        elif all(part is None for part in s.spec):
            assert all(size % 4 for size in x.shape), path
    assert moments >= {"sgd": 1, "lion": 1, "adafactor": 1, "muon": 1}.get(name, 2) * len(stored)
    assert {p: s.spec for p, s in paths.flatten(shardings.average)} == stored


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PlanConfig(zero=4), "zero=4 is not one of 0, 1, 2, 3"),
        (lambda: PlanConfig(model=0), "model=0 must be at least 1"),
        (lambda: PlanConfig(replica=-1), "replica=-1 must be at least 1"),
        (lambda: PlanConfig(remat="some"), "remat='some'"),
        (lambda: PlanConfig(attention="flash"), "attention='flash'"),
        (lambda: PlanConfig(pipe=2, seq=2), "plan.pipe and plan.seq exclude each other"),
        (lambda: PlanConfig(offload=("nvme",)), "offload=nvme is not one of optimizer, update, parameters, disk"),
        (lambda: PlanConfig(compiler=("xla_fast",)), "plan.compiler holds .xla_fast., which is not of the form"),
        (lambda: make(data=2, seq=4).check_batch(8, 1, 10), "=10 does not divide by plan.seq=4: take 8 or 12"),
        (lambda: make(data=3), "need 3 devices, there are 8"),
        (lambda: make(data=4, model=2).check_batch(6), r"=6 does not divide by 4 \(data=4 x accumulation=1\)"),
        (lambda: make(replica=2).check_batch(8, 2), r"batch_size=8 does not divide by 16 \(data=8 x accumulation=2\)"),
    ],
)  # fmt: skip
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
