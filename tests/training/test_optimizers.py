"""Schedules and first steps in closed form; every optimizer descends, stacked as unstacked."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, abstract, model_params

from llm_jax.nn import paths, weights
from llm_jax.nn.stack import stack, unstack
from llm_jax.training.optimizers import (
    NAMES,
    OUTPUTS,
    OptimizerConfig,
    learning_rate,
    make_optimizer,
    make_schedule,
    unread,
)
from llm_jax.training.program import optimizer_of
from llm_jax.training.run_config import RunConfig

STEPS = 40


def decay(t, start, length):
    return min(max((t - start) / length, 0), 1)


SCHEDULES = {
    "constant": (dict(schedule="constant"), lambda t: 2.0),
    "warmup": (dict(schedule="constant", warmup_steps=5), lambda t: 2.0 * min((t + 1) / 5, 1)),
    "linear": (
        dict(schedule="linear", warmup_steps=10, final_ratio=0.25),
        lambda t: 2.0 * (t + 1) / 10 if t < 10 else 2.0 * (1 - 0.75 * decay(t, 10, 30)),
    ),
    "cosine": (
        dict(schedule="cosine", warmup_steps=8, final_ratio=0.1),
        lambda t: 2.0 * (t + 1) / 8 if t < 8 else 2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * decay(t, 8, 32)))),
    ),
    "wsd": (
        dict(schedule="wsd", warmup_steps=5, decay_steps=10, final_ratio=0.0),
        lambda t: 2.0 * min((t + 1) / 5, 1) * (1 - decay(t, 30, 10)),
    ),
    "wsd, a tenth": (dict(schedule="wsd", final_ratio=0.5), lambda t: 2.0 * (1 - 0.5 * decay(t, 36, 4))),
    "noam": (
        dict(schedule="noam", warmup_steps=7, noam_dim=64),
        lambda t: 2.0 * 64**-0.5 * min((t + 1) ** -0.5, (t + 1) * 7**-1.5),
    ),
}


def test_schedules():
    made = {
        name: make_schedule(OptimizerConfig(learning_rate=2.0, **row), STEPS) for name, (row, _) in SCHEDULES.items()
    }
    every = jax.jit(lambda t: {name: jax.vmap(schedule)(t) * jnp.ones(t.shape) for name, schedule in made.items()})
    for name, rates in every(jnp.arange(STEPS + 5)).items():
        want = [SCHEDULES[name][1](t) for t in range(STEPS + 5)]
        np.testing.assert_allclose(rates, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_rate_of_a_step_counts_updates_only():
    """Both of an update and of a step that was skipped, whose counter stays."""
    config = OptimizerConfig(learning_rate=2.0, schedule="linear")
    tx, rate = make_optimizer(config, STEPS), make_schedule(config, STEPS)
    params = {"kernel": np.ones((2, 2), np.float32)}
    state = tx.init(params)
    for count in range(3):
        assert learning_rate(rate, state, updated=False) == float(rate(count))
        _, state = tx.update(params, state, params)
        assert learning_rate(rate, state, updated=True) == float(rate(count))


RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
TREE = {
    "layers": {"up": {"kernel": normal(2, 3, 5), "bias": normal(2, 5)}, "norm": {"scale": normal(2, 3)}},
    "embed": {"embedding": normal(4, 3)},
    "head": {"kernel": normal(3, 4)},
}
BIG = {"layers": {"kernel": normal(2, 128, 130), "bias": normal(2, 5)}, "kernel": normal(128, 129)}  # factored
TARGETS = {id(t): jax.tree.map(lambda x: normal(*x.shape), t) for t in (TREE, BIG)}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_and_treats_layers_alike(name):
    tree = BIG if name == "adafactor" else TREE
    target = TARGETS[id(tree)]
    rate = {"sgd": 0.1, "lion": 0.03, "muon": 0.05}.get(name, 0.1)
    b2 = {} if name in ("adafactor", "sgd") else {"b2": 0.99}
    config = OptimizerConfig(name, rate, "constant", weight_decay=0.0 if name == "adam" else 0.01, **b2)
    tx = make_optimizer(config, 50)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, split):
        convert = unstack if split else lambda t: t
        params, goal = convert(params), convert(target)
        loss = lambda p: (
            sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(goal), strict=True)) / 2
        )

        def one(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(one, (params, tx.init(params)), length=40)
        return stack(params), losses

    together, losses = jax.device_get(run(tree, False))
    apart, _ = jax.device_get(run(tree, True))
    assert losses[-1] < 0.25 * losses[0]
    for (path, a), b in zip(paths.flatten(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=path)


LR, B1, B2, EPS, DECAY = 0.1, 0.8, 0.9, 1e-3, 0.3


def adam(g, m, v, t):
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS), m, v


def lion(g, m, v, t):
    return np.sign(B1 * m + (1 - B1) * g), B2 * m + (1 - B2) * g, v


def sgd(g, m, v, t):
    return g + B1 * m, g + B1 * m, v


@pytest.mark.parametrize(
    "name, rule, decays", [("adam", adam, 0), ("adamw", adam, 1), ("lion", lion, 1), ("sgd", sgd, 1)]
)
def test_three_steps_in_closed_form(name, rule, decays):
    fields = {k: v for k, v in dict(b1=B1, b2=B2, eps=EPS).items() if k not in unread(name, "constant")}
    tx = make_optimizer(OptimizerConfig(name, LR, "constant", **fields, weight_decay=DECAY * decays), 9)
    params = {"kernel": normal(3, 4), "bias": normal(4)}
    grads = [jax.tree.map(lambda x: normal(*x.shape), params) for _ in range(3)]

    @jax.jit
    def run(p, grads):
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        return p

    got = run(params, grads)
    for leaf in params:
        p, m, v = np.float64(params[leaf]), 0.0, 0.0
        for t, g in enumerate(grads, 1):
            update, m, v = rule(np.float64(g[leaf]), m, v, t)
            p = p - LR * (update + DECAY * decays * p * (leaf == "kernel"))
        np.testing.assert_allclose(got[leaf], p, rtol=1e-5, atol=1e-6)


def first_update(name, params, grads):
    tx = make_optimizer(OptimizerConfig(name, 1.0, "constant", weight_decay=0.0), 9)
    return jax.device_get(jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads))


def test_adafactor_keeps_row_and_column_means():
    grads = {"kernel": normal(128, 140)}
    square = np.float64(grads["kernel"]) ** 2
    row, column = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    want = grads["kernel"] / np.sqrt(row * column / row.mean())
    want = want / max(1, np.sqrt((want**2).mean()))
    np.testing.assert_allclose(first_update("adafactor", grads, grads)["kernel"], -want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_muon_orthogonalises(shape):
    grads = {"kernel": normal(*shape)}
    update = -first_update("muon", grads, grads)["kernel"]
    u, _, v = np.linalg.svd(grads["kernel"], full_matrices=False)
    inner = u.T @ update @ v.T  # diagonal, each singular value near 1, times sqrt(out / in) where that grows
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 0.02
    size = np.diag(inner) / max(1, shape[1] / shape[0]) ** 0.5
    assert (size > 0.65).all() and (size < 1.25).all()  # five Newton-Schulz steps reach [0.7, 1.2]


def heads_of(table):
    """Every config, and one of each family with every head that it has."""
    yield from table.values()
    for config in {type(config): config for config in table.values()}.values():
        for head in ("lm", "pretraining", "classification", "tokens"):
            with contextlib.suppress(ValueError, TypeError):
                yield dataclasses.replace(config, head=head)


@pytest.mark.parametrize("table", [MODELS, ENCODERS, ENCODER_DECODERS], ids=["decoders", "encoders", "both"])
def test_muon_leaves_every_output_layer_to_adam(table):
    """Kernels whose columns are words or labels, by their axes; all other kernels are hidden layers'."""
    output, seen = paths.matcher(OUTPUTS), set()
    for config in heads_of(table):
        params, axes = abstract(config.make(), np.zeros((1, 2), int))
        names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, weights.Axes))
        for (path, _), own in zip(paths.flatten(params), names, strict=True):
            if path.endswith("kernel"):
                assert output(path) == bool({"vocab", "labels"} & set(own)), path
                seen |= {path} if output(path) else set()
    assert "classifier/kernel" in seen


def test_muon_steps_an_output_layer_as_adam_does():
    grads = {"head": {"kernel": normal(4, 6)}, "attention": {"out": {"kernel": normal(4, 6)}}}
    muon, adam = (first_update(name, grads, grads) for name in ("muon", "adamw"))
    np.testing.assert_allclose(muon["head"]["kernel"], adam["head"]["kernel"], rtol=1e-6)
    assert np.abs(muon["attention"]["out"]["kernel"] - adam["attention"]["out"]["kernel"]).max() > 0.1


def test_noams_width_is_the_models():
    run = RunConfig(MODELS["gpt2"], optimizer=OptimizerConfig("adam", 1.0, "noam", warmup_steps=1, weight_decay=0.0))
    assert make_schedule(optimizer_of(run), 9)(0) == pytest.approx(MODELS["gpt2"].model_dim ** -0.5)
    own = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, noam_dim=64))
    assert make_schedule(optimizer_of(own), 9)(0) == pytest.approx(64**-0.5)
    with pytest.raises(ValueError, match="schedule=noam needs noam_dim, the model's width"):
        make_schedule(run.optimizer, 9)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_decay_leaves_norms_and_biases_alone(name):
    params = model_params(MODELS[name])
    tx = make_optimizer(OptimizerConfig("sgd", 0.5, "constant", b1=0.0, weight_decay=0.1), 9)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(zeros, params)
    decayed = 0
    for (path, u), p in zip(paths.flatten(updates), jax.tree.leaves(params), strict=True):
        wanted = path.split("/")[-1] in ("kernel", "embedding")
        decayed += wanted
        np.testing.assert_allclose(u, -0.05 * p if wanted else 0 * p, rtol=1e-5, atol=1e-8, err_msg=path)
    assert 0 < decayed < len(jax.tree.leaves(params))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"name": "adagrad"}, "optimizer name='adagrad' is not one of adam, "),
        ({"schedule": "step"}, "schedule='step' is not one of constant, "),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"name": "adafactor", "eps": 1e-30}, "eps=1e-30 has no effect with name=adafactor and .* leave it at 1e-08"),
        ({"name": "adafactor", "b1": 0.0}, "b1=0.0 has no effect"),
        ({"name": "lion", "eps": 1e-6}, "eps=1e-06 has no effect with name=lion"),
        ({"name": "sgd", "b2": 0.99}, "b2=0.99 has no effect with name=sgd"),
        ({"noam_dim": 64}, "noam_dim=64 has no effect with name=adamw and schedule=cosine: leave it at None"),
        ({"schedule": "constant", "final_ratio": 0.0}, "final_ratio=0.0 has no effect .* schedule=constant"),
        ({"decay_steps": 5}, "decay_steps=5 has no effect"),
        ({"name": "adam"}, r"adam has no weight decay: set weight_decay=0 \(it is 0.1\) or name=adamw"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**fields)
