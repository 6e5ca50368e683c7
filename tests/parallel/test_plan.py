"""Every plan equals one device after two optimizer steps: parameters, moments, losses, no leaf left out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, abstract, model_params

from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.optimizers import NAMES, OptimizerConfig, make_optimizer
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

ROWS, T = 16, 8
MODELS_HERE = {  # sizes that 8 devices divide, but for what a row is about
    "gpt": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_heads=3, hidden_dim=16, dropout=0.1, attention_dropout=0.1
    ),
    "llama": dataclasses.replace(
        MODELS["llama"], model_dim=16, num_heads=4, head_dim=8, hidden_dim=24, vocab_pad_multiple=8
    ),
    "albert": dataclasses.replace(ENCODERS["albert"], model_dim=16, num_heads=4, hidden_dim=24),
    "bert": dataclasses.replace(
        ENCODERS["bert"], model_dim=16, num_heads=4, vocab_pad_multiple=8, dropout=0.0, attention_dropout=0.0
    ),
    "t5": dataclasses.replace(
        ENCODER_DECODERS["t5_1.1"], model_dim=16, num_heads=4, head_dim=8, hidden_dim=24, dropout=0.0
    ),
    "transformer": dataclasses.replace(
        ENCODER_DECODERS["transformer"], model_dim=16, num_heads=4, hidden_dim=24, dropout=0.0
    ),
    "xlnet": XLNetConfig(
        vocab_size=V, model_dim=16, num_layers=2, num_heads=4, hidden_dim=24, dropout=0.0, vocab_pad_multiple=8,
        memory_length=6,
    ),
}  # fmt: skip
ROWS_OF_TABLE = {  # name: (plan, model, accumulation)
    "data 8": (PlanConfig(data=8), "gpt", 1),
    "tensor 2, zero 1": (PlanConfig(data=4, model=2, zero=1), "llama", 1),
    "tensor 4 with indivisible heads, zero 3": (PlanConfig(data=2, model=4, zero=3), "gpt", 1),
    "replicas, zero 2": (PlanConfig(replica=2, zero=2), "gpt", 1),
    "zero 3": (PlanConfig(data=8, zero=3, attention="chunked"), "llama", 1),
    "accumulation, zero 2, remat, unrolled": (
        PlanConfig(data=4, model=2, zero=2, remat="full", unroll=True),
        "llama",
        2,
    ),
}
ENCODER_ROWS = {
    "albert, tensor 2, zero 3": (PlanConfig(data=4, model=2, zero=3), "albert", 1),
    "bert, zero 2, accumulation, unrolled": (PlanConfig(data=8, zero=2, unroll=True), "bert", 2),
    "t5, tensor 2, zero 3": (PlanConfig(data=4, model=2, zero=3), "t5", 1),
    "transformer, replicas, zero 1, accumulation": (PlanConfig(replica=2, zero=1), "transformer", 2),
    "xlnet with a memory, tensor 2, zero 2": (PlanConfig(data=4, model=2, zero=2), "xlnet", 1),
}
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T + 1)).astype(np.int32),
        "loss_weights": (RNG.random((ROWS, T + 1)) < 0.8).astype(np.float32),
    }
    for _ in range(2)
]
PADDED = (np.arange(T) < RNG.integers(3, T + 1, ROWS)[:, None]).astype(np.int32)
MASKED = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "attention_mask": PADDED,
        "token_type_ids": (np.arange(T) > 2).astype(np.int32) * PADDED,
        "pair_labels": RNG.integers(0, 2, ROWS).astype(np.int32),
        "mask_seed": np.arange(i * ROWS, (i + 1) * ROWS, dtype=np.int32),  # static, so that a row's mask is its own
    }
    for i in range(2)
]
PAIRS = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "attention_mask": PADDED,
        "labels": np.where(RNG.random((ROWS, T)) < 0.8, RNG.integers(0, V, (ROWS, T)), -100).astype(np.int32),
    }
    for _ in range(2)
]
PLAIN = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "token_type_ids": (np.arange(ROWS * T).reshape(ROWS, T) % 5 > 2).astype(np.int32),
        "continues": np.arange(ROWS) % 3 > 0,
    }
    for _ in range(2)
]
MASKED_LM = MaskedLM(mask_id=3, vocab_size=V)
TASKS = {  # objective and batches, where they are not a decoder's
    "albert": (MASKED_LM, MASKED),
    "bert": (MASKED_LM, MASKED),
    "t5": (Seq2Seq(start_id=0, label_smoothing=0.1), PAIRS),
    "transformer": (Seq2Seq(start_id=0), PAIRS),
    "xlnet": (PermutationLM(carry=True), PLAIN),
}
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-3), 2)


def init(params, name):
    carry = MODELS_HERE[name].init_carry(ROWS) if name == "xlnet" else None
    return init_state(params, TX, jax.random.key(3), carry=carry)


@functools.cache
def start(name):
    """On the host: a step donates its buffers."""
    make = jax.jit(lambda p: init(p, name).replace(key=None))
    return jax.device_get(make(model_params(MODELS_HERE[name], std=0.1)))


def two_steps(plan_config, name, accumulation, devices=None):
    """The state after two steps as `training.run` makes them, and both steps' metrics."""
    config = MODELS_HERE[name]
    plan = Plan(plan_config, config, devices)
    plan.check_batch(ROWS, accumulation)
    model = config.make(plan.execution())
    params, axes = abstract(model, np.zeros((1, T), np.int32))
    shardings = plan.state_shardings(jax.eval_shape(lambda p: init(p, name), params), axes)
    grads = plan.grad_shardings(params, axes)
    pin = lambda tree: jax.tree.map(jax.lax.with_sharding_constraint, tree, grads)
    options = StepConfig(accumulation, unroll=plan_config.unroll)
    objective, batches = TASKS.get(name, (CausalLM(z_loss=1e-2), BATCHES))
    step = make_train_step(model, objective, TX, options, constrain_grads=pin if plan.mesh.size > 1 else lambda g: g)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    state = jax.device_put(start(name).replace(key=jax.random.key(3)), shardings)
    metrics = []
    for batch in batches:
        state, values = step(state, jax.device_put(batch, plan.batch_sharding()))
        metrics.append(jax.device_get(values))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))
    return state, metrics


@functools.cache
def one_device(name):
    state, metrics = two_steps(PlanConfig(data=1), name, 1, jax.devices()[:1])
    return jax.device_get(state.replace(key=None)), metrics


@functools.cache
def under(row):
    return two_steps(*{**ROWS_OF_TABLE, **ENCODER_ROWS}[row])


def on_one_device(tree):
    """Bytes of a tree that device 0 holds."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("row", [*ROWS_OF_TABLE, *ENCODER_ROWS])
def test_every_plan_equals_one_device(row):
    state, metrics = under(row)
    name = {**ROWS_OF_TABLE, **ENCODER_ROWS}[row][1]
    want, want_metrics = one_device(name)
    got = jax.device_get(state.replace(key=None))
    before = dict(paths.flatten(start(name).params))
    for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)
        if path.startswith("params/") and not path.endswith("key/bias"):  # whose gradient is zero in theory
            assert not np.array_equal(b, before[path.removeprefix("params/")]), path  # it did learn
    for a, b in zip(metrics, want_metrics, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)


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
    data = 8 // (config.model * config.replica)
    divided = paths.matcher(TENSOR[name])
    sizes = [x.size / (config.model if divided(p) else 1) for p, x in paths.flatten(state.params)]
    counters = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim == 0)
    assert on_one_device(state.params) == 4 * sum(sizes) / (data if config.zero >= 3 else 1)
    assert on_one_device(state.opt_state) - counters == 8 * sum(sizes) / (data if config.zero >= 1 else 1)


def make(model_config=MODELS_HERE["gpt"], **sizes):
    return Plan(PlanConfig(**sizes), model_config)


def test_heads_that_do_not_divide_are_replicated_and_said():
    assert make(model=4, data=2).notes == ["attention is replicated: 3 query and 3 key heads do not divide by model=4"]
    assert make(MODELS_HERE["llama"], model=2, data=4).notes == []
    params, axes = abstract(MODELS_HERE["gpt"].make(), np.zeros((1, 4), np.int32))
    text = make(model=2, data=4, zero=3).describe(params, axes)
    assert "mesh {'replica': 1, 'data': 4, 'model': 2}, zero 3" in text and "attention is replicated: 3" in text
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
        (lambda: PlanConfig(zero=4), "zero=4 is none of 0, 1, 2, 3"),
        (lambda: PlanConfig(model=0), "model=0 must be at least 1"),
        (lambda: PlanConfig(replica=-1), "replica=-1 must be at least 1"),
        (lambda: PlanConfig(remat="some"), "remat='some'"),
        (lambda: PlanConfig(attention="flash"), "attention='flash'"),
        (lambda: make(data=3), "need 3 devices, there are 8"),
        (lambda: make(data=4, model=2).check_batch(6), r"=6 does not divide by 4 \(data=4 x accumulation=1\)"),
        (lambda: make(replica=2).check_batch(8, 2), r"batch_size=8 does not divide by 16 \(data=8 x accumulation=2\)"),
    ],
)  # fmt: skip
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
