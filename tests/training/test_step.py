"""One optimizer step on a toy model, where every number can be computed by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from llm_jax.nn.attention import dropout
from llm_jax.nn.linear import Linear
from llm_jax.objectives.objective import Prepared
from llm_jax.training.precision import Precision
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_eval_step, make_train_step

ROWS, D = 8, 3
RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
PARAMS = {"one": {"kernel": normal(D, D)}, "two": {"kernel": normal(D, D), "bias": normal(D)}}
BATCH = {"x": normal(ROWS, D), "y": normal(ROWS, D), "weight": np.array([1, 0, 2, 0.5, 0, 0, 3, 1], np.float32)}


class Toy(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = dropout(self, x, self.rate, train)
        one, two = Linear(D, ("embed", "mlp"), False, name="one"), Linear(D, ("embed", "mlp"), name="two")
        return types.SimpleNamespace(y=two(jnp.tanh(one(x))))


@dataclasses.dataclass(frozen=True)
class Two:
    """Two terms whose weights differ from row to row; both are means over the whole batch."""

    coefficients: dict = dataclasses.field(default_factory=lambda: {"square": 1.0, "size": 0.5}, hash=False)

    def prepare(self, batch, key):
        del key
        w = batch["weight"]
        totals = {"square": jnp.sum(w), "size": jnp.sum(1 - w / 4)}
        return Prepared({"x": batch["x"]}, (batch["y"], w), totals)

    def score(self, output, targets):
        y, w = targets
        error = jnp.sum(jnp.square(output.y.astype(jnp.float32) - y), -1)
        size = jnp.sum(jnp.abs(output.y.astype(jnp.float32)), -1)
        return {"square": jnp.sum(error * w), "size": jnp.sum(size * (1 - w / 4))}


def loss_and_gradients(params, batch):
    """By hand, in float64."""
    p, x, y, w = jax.tree.map(np.float64, params), *(np.float64(batch[k]) for k in ("x", "y", "weight"))
    h = np.tanh(x @ p["one"]["kernel"])
    out = h @ p["two"]["kernel"] + p["two"]["bias"]
    v = 1 - w / 4
    loss = (((out - y) ** 2).sum(-1) * w).sum() / w.sum() + 0.5 * (np.abs(out).sum(-1) * v).sum() / v.sum()
    g = 2 * (out - y) * w[:, None] / w.sum() + 0.5 * np.sign(out) * v[:, None] / v.sum()
    dh = g @ p["two"]["kernel"].T * (1 - h**2)
    return loss, {"one": {"kernel": x.T @ dh}, "two": {"kernel": h.T @ g, "bias": g.sum(0)}}


def start(tx, precision=Precision(), params=PARAMS, **options):
    return jax.jit(lambda p: init_state(p, tx, jax.random.key(0), precision, **options))(params)


def take(state, batch=BATCH, tx=None, model=Toy(), **options):
    return jax.jit(make_train_step(model, Two(), tx, StepConfig(**options)))(state, batch)


def norm(tree):
    return np.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))


def close(a, b, bound=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=bound), a, b)


@pytest.mark.parametrize(
    "accumulation, precision",
    [(1, Precision()), (2, Precision()), (8, Precision()), (2, Precision("fp16", initial_scale=64.0))],
)
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulation, precision):
    """Micro-batches of unequal weight, some of none; the scale of the loss leaves no trace."""
    tx = optax.sgd(1.0)
    bound = 1e-5 if precision.compute == "fp32" else 2e-2
    state, metrics = take(start(tx, precision), tx=tx, accumulation=accumulation, clip_norm=0, precision=precision)
    loss, grads = loss_and_gradients(PARAMS, BATCH)
    close(state.params, jax.tree.map(lambda p, g: p - g, PARAMS, grads), bound)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=bound)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=bound)
    assert metrics["tokens"] == BATCH["weight"].sum() and state.step == 1
    means = metrics["square"] + 0.5 * metrics["size"]
    np.testing.assert_allclose(means, loss, rtol=bound)


def test_clipping_by_the_global_norm():
    tx = optax.sgd(1.0)
    state, metrics = take(start(tx), tx=tx, clip_norm=0.5)
    _, grads = loss_and_gradients(PARAMS, BATCH)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=1e-5)  # before clipping
    close(state.params, jax.tree.map(lambda p, g: p - g * 0.5 / norm(grads), PARAMS, grads))


@pytest.mark.parametrize(
    "precision, poison",
    [
        (Precision(), {"x": np.nan}),
        (Precision(), {"y": np.inf}),
        (Precision("fp16"), {"y": 3e4}),  # finite loss, gradients past 65504 once scaled
        (Precision("fp16", "in_optimizer"), {"y": 3e4}),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters(precision, poison):
    tx = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
    state = start(tx, precision, ema=True)
    step = jax.jit(make_train_step(Toy(), Two(), tx, StepConfig(ema=0.9, precision=precision)))
    bad = {**BATCH, **{k: np.full_like(BATCH[k], v) for k, v in poison.items()}}
    after, metrics = step(state, bad)
    assert int(after.step) == 1 and int(after.bad_steps) == int(metrics["bad_steps"]) == 1
    counters = dict(step=0, bad_steps=0, loss_scale=None, key=None)
    same = jax.tree.map(np.array_equal, after.replace(**counters), state.replace(**counters))
    assert jax.tree.all(same) and np.array_equal(*(jax.random.key_data(s.key) for s in (after, state)))
    again, _ = step(after, bad)
    good, _ = step(
        again.replace(loss_scale=None if state.loss_scale is None else state.loss_scale.replace(scale=jnp.float32(8))),
        BATCH,
    )
    assert (int(again.bad_steps), int(good.bad_steps), int(good.step)) == (2, 0, 3)
    assert not np.array_equal(good.params["two"]["bias"], state.params["two"]["bias"])
    if state.loss_scale is not None:
        assert [float(s.loss_scale.scale) for s in (state, after, again)] == [2.0**15, 2.0**14, 2.0**13]
        assert float(metrics["loss_scale"]) == 2.0**15 and np.isfinite(metrics["loss"])


def test_an_update_of_relative_size_1e_4():
    """Lost in fp16 weights, kept by the float32 master in either place."""
    params = jax.tree.map(np.ones_like, PARAMS)
    tx = optax.stateless(lambda g, p: jax.tree.map(lambda x: (1e-4 * jnp.ones(x.shape)).astype(x.dtype), g))
    step_of = lambda precision: jax.jit(make_train_step(Toy(), Two(), tx, StepConfig(precision=precision)))

    def after(state, precision, steps=20):
        step = step_of(precision)
        for _ in range(steps):
            state, _ = step(state, BATCH)
        return jax.device_get(state.replace(key=None))

    half = jax.tree.map(lambda x: x.astype(np.float16), params)
    lost = after(start(tx, Precision(), half), Precision())
    assert all((x == 1).all() and x.dtype == np.float16 for x in jax.tree.leaves(lost.params))
    for master in ("in_params", "in_optimizer"):
        precision = Precision("fp16", master, initial_scale=1.0)
        kept = after(start(tx, precision, params), precision)
        wide = kept.master if master == "in_optimizer" else kept.params
        close(wide, jax.tree.map(lambda x: x + 20e-4, params), 1e-6)
        if master == "in_optimizer":  # the stored copy follows by rounding
            assert jax.tree.all(jax.tree.map(lambda p, m: np.array_equal(p, m.astype(np.float16)), kept.params, wide))
            assert all((x > 1).all() for x in jax.tree.leaves(kept.params))


def test_moving_average():
    tx = optax.sgd(0.5)
    state = start(tx, ema=True)
    want = jax.tree.map(np.float64, PARAMS)
    step = jax.jit(make_train_step(Toy(), Two(), tx, StepConfig(ema=0.75)))
    for _ in range(3):
        state, _ = step(state, BATCH)
        want = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.float64(p), want, state.params)
    close(state.average, want)
    assert norm(jax.tree.map(lambda a, p: a - np.asarray(p), want, state.params)) > 1e-2


def test_what_is_frozen_stays_and_costs_no_state():
    tx = optax.adam(0.1)
    options = dict(trainable=("two/*",))
    frozen = {**PARAMS, "one": {"kernel": PARAMS["one"]["kernel"], "table": np.arange(3, dtype=np.int8)}}
    state = start(tx, params=frozen, **options)
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == 2
    after, metrics = take(state, tx=tx, **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, after.params["one"], frozen["one"]))
    assert not np.array_equal(after.params["two"]["kernel"], PARAMS["two"]["kernel"])
    _, grads = loss_and_gradients(PARAMS, BATCH)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads["two"]), rtol=1e-5)
    jaxpr = jax.make_jaxpr(make_train_step(Toy(), Two(), tx, StepConfig(**options)))(state, BATCH)
    assert str(jaxpr).count("dot_general[") == 3  # two forward, one for the kernel that trains


def test_ties_add_gradients_up_in_the_owner():
    tx, ties = optax.sgd(1.0), {"one/kernel": "two/kernel"}
    params = {"two": PARAMS["two"]}
    step = jax.jit(make_train_step(Toy(), Two(), tx, StepConfig(clip_norm=0, ties=ties)))
    state, _ = step(start(tx, params=params), BATCH)
    _, grads = loss_and_gradients({**params, "one": {"kernel": PARAMS["two"]["kernel"]}}, BATCH)
    want = {"kernel": params["two"]["kernel"] - grads["one"]["kernel"] - grads["two"]["kernel"]}
    close(state.params, {"two": {**want, "bias": params["two"]["bias"] - grads["two"]["bias"]}})


def test_dropout_depends_on_the_step_and_the_micro_batch_and_on_nothing_else():
    tx = optax.sgd(0.0)
    batch = {"x": np.ones((8, D), np.float32), "y": np.zeros((8, D), np.float32), "weight": np.ones(8, np.float32)}
    step = jax.jit(make_train_step(Toy(0.5), Two(), tx, StepConfig(accumulation=2)))
    state = start(tx)
    first, a = step(state, batch)
    _, b = step(first, batch)
    _, again = step(state, batch)
    assert a["loss"] != b["loss"] and a["loss"] == again["loss"]
    # rows i and i + 1 are dealt to the two micro-batches: equal masks would give every row's loss twice
    halves = []
    for index in range(2):
        only = {**batch, "weight": np.array([1, 0] * 4 if index == 0 else [0, 1] * 4, np.float32)}
        halves.append(float(step(state, only)[1]["square"]))
    assert halves[0] != halves[1]


def test_evaluation_has_no_dropout_and_returns_sums():
    scores, totals = jax.jit(make_eval_step(Toy(0.5), Two()))(PARAMS, BATCH)
    loss, _ = loss_and_gradients(PARAMS, BATCH)
    np.testing.assert_allclose(
        scores["square"] / totals["square"] + 0.5 * scores["size"] / totals["size"], loss, rtol=1e-5
    )


def test_rows_that_do_not_divide():
    tx = optax.sgd(1.0)
    with pytest.raises(ValueError, match="a batch of 8 rows does not divide into 3 micro-batches"):
        take(start(tx), tx=tx, accumulation=3)
