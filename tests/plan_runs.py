"""Optimizer steps of tiny models under a plan, as `training.run` makes them, and the same on one device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from delta_cells import masked
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, V, model_params

from llm_jax.delta import lora, methods
from llm_jax.delta.methods import DeltaConfig, Ia3Config
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths, ports, realized, weights
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.masked_lm import MaskedLM
from llm_jax.objectives.permutation_lm import PermutationLM
from llm_jax.objectives.seq2seq import Seq2Seq
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig, make_optimizer
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig

ROWS, T, STEPS = 16, 8, 3
MODELS_HERE = {  # sizes that 8 devices divide, but for what a row is about
    "gpt": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_heads=3, hidden_dim=16, dropout=0.1, attention_dropout=0.1
    ),
    "llama": dataclasses.replace(
        MODELS["llama"], model_dim=16, num_heads=4, head_dim=8, hidden_dim=24, vocab_pad_multiple=8
    ),
    "llama_wide": dataclasses.replace(MODELS["llama"], model_dim=32, num_heads=4, head_dim=8, hidden_dim=24),
    "deep": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_layers=5, num_heads=3, hidden_dim=16, dropout=0.1,
        attention_dropout=0.1,
    ),
    "still": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_heads=3, hidden_dim=16, dropout=0.0, attention_dropout=0.0
    ),
    "deep_even": dataclasses.replace(
        MODELS["gpt_untied_padded"], model_dim=24, num_layers=5, num_heads=4, hidden_dim=16, dropout=0.1,
        attention_dropout=0.1,
    ),
    "deep_tied": dataclasses.replace(
        MODELS["llama"], model_dim=16, num_layers=4, num_heads=4, head_dim=8, hidden_dim=24, vocab_pad_multiple=8,
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
    "xlnet_alone": XLNetConfig(
        vocab_size=V, model_dim=16, num_layers=2, num_heads=4, hidden_dim=24, dropout=0.1, vocab_pad_multiple=8
    ),
}  # fmt: skip
LORA = lora.LoraConfig(rank=8, targets=("attention/*/kernel", "mlp/*/kernel"))
MODELS_HERE["lora"] = MODELS_HERE["deep_tied"]  # with LoRA over a frozen base
MODELS_HERE["deltas"] = MODELS_HERE["deep_tied"]  # with several methods, some on some layers only
DELTAS = {
    "lora": DeltaConfig(LORA),
    "deltas": DeltaConfig(
        dataclasses.replace(LORA, targets=("layers[1:].attention", "mlp"), ranks=("layers[2].mlp=4",), dora=True),
        ia3=Ia3Config(),
        norms=True,
        token_rows=(1, 5),
    ),
}
MODELS_HERE["realized"] = MODELS_HERE["deep_tied"]  # queries and the token table are products of two matrices
MODELS_HERE["ports"] = MODELS_HERE["deep_tied"]  # with nodes in its ports
MODELS_HERE["shared"] = MODELS_HERE["still"]  # its keys are its queries
TIES = {"shared": ("decoder/layers/attention/key=decoder/layers/attention/query",)}
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T + 1)).astype(np.int32),
        "loss_weights": (RNG.random((ROWS, T + 1)) < 0.8).astype(np.float32),
    }
    for _ in range(STEPS)
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
    for i in range(STEPS)
]
PAIRS = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "attention_mask": PADDED,
        "labels": np.where(RNG.random((ROWS, T)) < 0.8, RNG.integers(0, V, (ROWS, T)), -100).astype(np.int32),
    }
    for _ in range(STEPS)
]
PLAIN = [
    {
        "input_ids": RNG.integers(0, V, (ROWS, T)).astype(np.int32),
        "token_type_ids": (np.arange(ROWS * T).reshape(ROWS, T) % 5 > 2).astype(np.int32),
        "continues": np.arange(ROWS) % 3 > 0,
    }
    for _ in range(STEPS)
]
TASKS = {  # objective and batches, where they are not a decoder's
    "albert": (MaskedLM(), MASKED),
    "bert": (MaskedLM(), MASKED),
    "t5": (Seq2Seq(label_smoothing=0.1), PAIRS),
    "transformer": (Seq2Seq(), PAIRS),
    "xlnet": (PermutationLM(carry=True), PLAIN),
    "xlnet_alone": (PermutationLM(), [{k: v for k, v in batch.items() if k != "continues"} for batch in PLAIN]),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-3)  # ARCHITECTURE.md says why 1e-3
TX = make_optimizer(OPTIMIZER, STEPS)


@functools.cache
def trainable(name):
    """Patterns of what trains; None for everything."""
    return methods.trainable(first_params(name), DELTAS[name]) if name in DELTAS else None


def task(name):
    """(objective, batches) of a model."""
    return TASKS.get(name, (CausalLM(z_loss=1e-2), BATCHES))


def program(plan_config, name, accumulation=1, devices=None, dtype="float32"):
    """(plan, what a run of it compiles)."""
    model = MODELS_HERE[name]
    training = LoopConfig(
        batch_size=ROWS,
        sequence_length=T,
        steps=STEPS,
        accumulation=accumulation,
        trainable=trainable(name),
    )
    config = RunConfig(
        model,
        objective=task(name)[0],
        optimizer=OPTIMIZER,
        plan=plan_config,
        training=training,
        ties=TIES.get(name, ()),
    )
    plan = Plan(plan_config, model, devices)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first_params(name, dtype))
    return plan, build(config, plan, 3, given)


class Bottleneck(ports.PortNode):
    """An adapter on the sum, behind the block's norm."""

    down: Any
    up: Any

    def __call__(self, x, residual, norm, key):
        return x + jnp.tanh(norm(x + residual) @ self.down) @ self.up


def plugged(params, rank=8):
    """Parameters of a decoder with a node in every port."""
    rng, layers = np.random.default_rng(2), params["decoder"]["layers"]
    count, dim = layers["attention_norm"]["scale"].shape

    def node(dtype):
        draw = lambda *shape: (rng.normal(size=(count, *shape)) * 0.3).astype(dtype)
        return Bottleneck(draw(dim, rank), draw(rank, dim))

    items = [
        (f"decoder/layers/{name}/{port}", node(np.float32)) for name in ("attention", "mlp") for port in ports.PORTS
    ]
    return paths.nested([*paths.flatten(params), *items])


class Factored(realized.Realized):
    """A matrix that is stored as two factors; the arc tangent is nowhere else in a model."""

    u: Any
    v: Any

    def realize(self):
        return jnp.arctan(self.u) @ self.v


def factored(params, targets=("query/kernel", "embed/embedding"), rank=8):
    """Parameters with two factors instead of each target."""
    rng = np.random.default_rng(2)

    def in_two(path, x):
        *lead, rows, columns = x.shape
        draw = lambda *shape: rng.normal(size=(*lead, *shape)).astype(x.dtype) * 0.3
        return Factored(draw(rows, rank), draw(rank, columns))

    return weights.replace(params, targets, in_two)


@functools.cache
def first_params(name, dtype="float32"):
    params = model_params(MODELS_HERE[name], std=0.1, dtype=dtype)
    if name == "ports":
        return plugged(params)
    if name == "realized":
        return factored(params)
    if name not in DELTAS:
        return params
    attached = jax.device_get(methods.attach(params, DELTAS[name], jax.random.key(0)))
    rng = np.random.default_rng(1)
    draw = lambda path, x: rng.normal(size=x.shape).astype(x.dtype) * 0.1 if path.endswith("/b") else x
    return masked(paths.map_with_path(draw, attached), attached)


@functools.cache
def start(name, dtype="float32"):
    """The first state, without its key, on the host: a step donates its buffers."""
    _, made = program(PlanConfig(data=1), name, devices=jax.devices()[:1], dtype=dtype)
    return jax.device_get(made.init(jax.random.key(3), first_params(name, dtype)).replace(key=None))


@functools.lru_cache(maxsize=12)  # as many as a file reads again: a process cannot map the code of hundreds
def compiled(plan_config, name, accumulation=1, devices=None, dtype="float32"):
    """(plan, program, its compiled step); `devices` is a tuple."""
    plan, made = program(plan_config, name, accumulation, devices, dtype)
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    batch = {k: described(x, plan.batch_sharding()) for k, x in task(name)[1][0].items()}
    return plan, made, made.step.lower(jax.tree.map(described, made.shapes, made.shardings), batch).compile()


def run_steps(plan_config, name, accumulation=1, devices=None, dtype="float32"):
    """The state after `STEPS` steps, and the metrics of each."""
    plan, made, step = compiled(plan_config, name, accumulation, devices and tuple(devices), dtype)
    state = jax.device_put(start(name, dtype).replace(key=jax.random.key(3)), made.shardings)
    metrics = []
    for batch in task(name)[1]:
        state, values = step(state, jax.device_put(batch, plan.batch_sharding()))
        metrics.append(jax.device_get(values))
    same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) and x.sharding.memory_kind == s.memory_kind
    assert jax.tree.all(jax.tree.map(same, state, made.shardings))
    return state, metrics


@functools.cache
def one_device(name, accumulation=1, dtype="float32"):
    state, metrics = run_steps(PlanConfig(data=1), name, accumulation, jax.devices()[:1], dtype)
    return jax.device_get(state.replace(key=None)), metrics


def assert_equals_one_device(state, metrics, name, accumulation=1, dtype="float32"):
    """Parameters, moments, losses and norms of a run equal those on one device, no leaf left out.

    What trains did learn, and what is frozen stayed as it was.
    """
    rtol, atol = {"float32": (1e-5, 1e-6), "float64": (1e-11, 1e-12)}[dtype]
    want, want_metrics = one_device(name, accumulation, dtype)
    got = jax.device_get(state.replace(key=None))
    before = dict(paths.flatten(start(name, dtype).params))
    trains = paths.matcher("*" if trainable(name) is None else trainable(name))
    for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)
        if path.startswith("params/") and not path.endswith("key/bias"):  # whose gradient is zero in theory
            assert np.array_equal(b, before[path.removeprefix("params/")]) != trains(path), path
    for a, b in zip(metrics, want_metrics, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=rtol, err_msg=key)
