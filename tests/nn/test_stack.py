"""Scanned and unrolled stacks give the same numbers, under every remat policy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from tiny_models import abstract, random_params

from llm_jax.nn import weights
from llm_jax.nn.attention import dropout
from llm_jax.nn.execution import Execution
from llm_jax.nn.linear import Linear
from llm_jax.nn.stack import Stack, is_unstacked, stack, unstack

L, B, D, F = 4, 3, 4, 5
X = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
EXTRA = tuple(np.full((B, D), 0.1 * i, np.float32) for i in range(L))


class Block(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, extra, factor, train=False):
        h = checkpoint_name(Linear(F, ("embed", "mlp"), name="up")(x), "hidden")
        y = Linear(D, ("mlp", "embed"), use_bias=False, name="down")(jnp.tanh(h) * factor)
        y = dropout(self, y, self.rate, train)
        self.sow("intermediates", "size", jnp.sum(y))
        x = x + y + (0 if extra is None else extra)
        return x, jnp.mean(x, axis=-1)


def make(rate=0.0, groups=None, **execution):
    return Stack(functools.partial(Block, rate), L, groups, Execution(**execution))


PARAMS = random_params(make(), X, None, (1.0,))


def layer_by_layer(params, groups=L):
    """The block in plain numpy; returns the last x and all means."""
    x, means = X.astype(np.float64), []
    for l in range(L):
        p = jax.tree.map(lambda w: np.float64(w[l * groups // L]), params["layers"])  # noqa: B023
        x = x + np.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) * 2.0 @ p["down"]["kernel"] + EXTRA[l]
        means.append(x.mean(-1))
    return x, means


def value_and_gradients(module, params, train=False):
    def loss(params, x):
        # a generator that compiles to one operation
        rngs = {"dropout": jax.random.key(7, impl="unsafe_rbg")} if train else {}
        out, means = module.apply({"params": params}, x, EXTRA, (2.0,), train, rngs=rngs)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(m * (i + 1)) for i, m in enumerate(means)), (out, means)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, X)


def close(a, b, bound=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


def test_every_form_and_policy_gives_the_same():
    """Outputs, dropout and gradients; the first also equals numpy."""
    policies = ("none", "dots", "full", "every:2", "names:hidden")

    @jax.jit
    def every(params):
        runs = {("scanned", r): value_and_gradients(make(0.3, remat=r), params, True) for r in policies}
        split = unstack(params)
        for r in ("none", "every:2", "names:hidden"):
            value, (grads, dx) = value_and_gradients(make(0.3, remat=r), split, True)
            runs["unrolled", r] = value, (stack(grads), dx)
        return runs, value_and_gradients(make(0.3), params)

    runs, still = jax.device_get(every(PARAMS))
    (_, (out, means)), _ = still
    close((out, means), layer_by_layer(PARAMS))
    first = runs["scanned", "none"]
    assert abs(first[0][0] - still[0][0]) > 1e-2  # dropout was on
    for run in runs.values():
        close(run, first)


@pytest.mark.parametrize("unrolled", [False, True])
def test_every_layer_draws_its_own_dropout(unrolled):
    """Ones pass a block that adds ones, so the output counts the layers that kept an entry."""
    params = jax.tree.map(np.zeros_like, PARAMS)
    params["layers"]["up"]["bias"] += 1
    params["layers"]["down"]["kernel"] += 1
    x = np.zeros((2000, D), np.float32)
    run = jax.jit(lambda p, key: make(0.5).apply({"params": p}, x, None, (1.0,), True, rngs={"dropout": key})[0])
    kept = run(unstack(params) if unrolled else params, jax.random.key(0)) / (2 * F * math.tanh(1))
    share = np.bincount(np.rint(np.asarray(kept)).astype(int).ravel(), minlength=L + 1) / kept.size
    np.testing.assert_allclose(share, [math.comb(L, i) / 2**L for i in range(L + 1)], atol=0.03)


@pytest.mark.parametrize(
    "remat, saved",
    [
        ("none", None),
        ("full", {(B, D): L - 1}),  # block inputs; the first is an argument
        ("every:2", {(B, D): L // 2 - 1}),
        ("names:hidden", {(B, D): L - 1, (B, F): L}),
        ("dots", {(B, D): L - 1, (B, F): L}),  # the second product is added and never read again
    ],
)
def test_what_the_backward_pass_keeps(remat, saved, capsys):
    module, params = make(remat=remat), unstack(PARAMS)
    loss = lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, X, None, (2.0,))[0]))
    print_saved_residuals(loss, params)
    lines = [l for l in capsys.readouterr().out.splitlines() if "from the argument" not in l and "constant" not in l]
    counts = {shape: sum(l.startswith(f"f32[{shape[0]},{shape[1]}]") for l in lines) for shape in ((B, D), (B, F))}
    if saved is None:
        assert sum(counts.values()) > 3 * L
    else:
        # the loss itself keeps one, the last block's output
        assert counts == {(B, D): saved[B, D] + 1, (B, F): saved.get((B, F), 0)}


def test_stack_and_unstack_are_inverse():
    tree = {"decoder": PARAMS, "embed": {"embedding": X}}
    split = unstack(tree)
    assert list(split["decoder"]["layers"]) == ["0", "1", "2", "3"]
    assert is_unstacked(split["decoder"]["layers"]) and not is_unstacked(tree["decoder"]["layers"])
    again = stack(split)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tree))
    assert unstack(split) is not tree and jax.tree.structure(unstack(split)) == jax.tree.structure(split)
    assert jax.tree.structure(stack(tree)) == jax.tree.structure(tree)


def test_unequal_layers_run_unrolled_and_refuse_to_stack():
    layers = unstack(PARAMS)["layers"]
    for changed in (
        {**layers["2"], "up": {"kernel": layers["2"]["up"]["kernel"].astype(np.float16)}},
        {"up": layers["2"]["up"]},
    ):
        with pytest.raises(ValueError, match="differ in structure or shape"):
            stack({"layers": {**layers, "2": changed}})


def test_groups_share_parameters_and_their_gradients_add_up():
    two = jax.tree.map(lambda x: x[:2], PARAMS)
    shapes, axes = abstract(make(groups=2), X, None, (1.0,))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, two)
    assert axes["layers"]["up"]["kernel"] == weights.Axes("layers", "embed", "mlp")

    @jax.jit
    def run(two):
        full = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), two)
        scanned, unrolled = (value_and_gradients(make(groups=2), p) for p in (two, unstack(two)))
        return scanned, unrolled, value_and_gradients(make(), full)

    scanned, unrolled, full = jax.device_get(run(two))
    close(scanned[0][1], layer_by_layer(two, groups=2))
    close(scanned[0], unrolled[0])
    close(scanned[1][0], stack(unrolled[1][0]))
    close(scanned[1][0], jax.tree.map(lambda g: g.reshape(2, 2, *g.shape[1:]).sum(1), full[1][0]))


@pytest.mark.parametrize("unrolled", [False, True])
def test_per_layer_entries_merge_into_shared_layers(unrolled):
    """One shared group, and a bias of its own in every layer."""
    shared = jax.tree.map(lambda x: x[:1], PARAMS)
    own = {"up": {"bias": PARAMS["layers"]["up"]["bias"]}}
    params = {**shared, "per_layer": own}
    params = unstack(params) if unrolled else params
    full = jax.tree.map(lambda x: np.repeat(x, L, axis=0), shared)
    full["layers"]["up"]["bias"] = own["up"]["bias"]
    out, means = jax.jit(make(groups=1).apply)({"params": params}, X, EXTRA, (2.0,))
    close((out, means), layer_by_layer(full))


def test_sown_values_come_out_of_both_forms():
    run = jax.jit(lambda p: make().apply({"params": p}, X, None, (1.0,), mutable=["intermediates"])[1])
    scanned, unrolled = run(PARAMS), run(unstack(PARAMS))
    assert set(scanned["intermediates"]) == {"0", "1", "2", "3"}
    close(scanned, unrolled)


def test_a_stack_runner_takes_the_place_of_the_loop():
    def backwards(call):
        assert (call.path, call.group_of) == ((), tuple(range(L)))
        carry, outputs = call.carry, []
        for index in reversed(range(L)):
            p = jax.tree.map(lambda x: x[index], call.params)  # noqa: B023
            carry, out, _ = call.layer(p, index, carry, call.per_layer[index], call.context)
            outputs.append(out)
        return carry, tuple(outputs)

    out = jax.jit(make(stack_runner=backwards).apply)({"params": PARAMS}, X, EXTRA[::-1], (2.0,))
    close(out, layer_by_layer(jax.tree.map(lambda x: x[::-1], PARAMS)))


def test_errors():
    with pytest.raises(ValueError, match="layers holds 4 layers, the config asks for 2"):
        make(groups=2).apply({"params": PARAMS}, X, None, (1.0,))
    with pytest.raises(ValueError, match="remat='every:3' does not divide 4 layers"):
        jax.eval_shape(lambda: make(remat="every:3").apply({"params": PARAMS}, X, None, (1.0,)))
    params = {"layers": PARAMS["layers"], "per_layer": PARAMS["layers"]}
    with pytest.raises(ValueError, match="a stack_runner runs layers that share their structure"):
        make(stack_runner=lambda *a: None).apply({"params": params}, X, None, (1.0,))


@pytest.mark.parametrize(
    "layers, groups, size, order",
    [
        (4, None, 1, [0, 1, 2, 3]),
        (4, 2, 1, [0, 0, 1, 1]),
        (3, 2, 1, [0, 0, 1]),
        (8, 4, 2, [0, 1, 0, 1, 2, 3, 2, 3]),
        (6, 3, 3, [0, 1, 2, 0, 1, 2]),
    ],
)
def test_which_parameters_a_layer_has(layers, groups, size, order):
    """Layers of a group run in turn before they are used again."""
    seen = []

    def runner(call):
        seen.append(call.group_of)
        return call.carry, None

    made = Stack(Block, layers, groups, Execution(stack_runner=runner), size)
    params = random_params(Stack(Block, layers, groups, group_size=size), X, None, (1.0,))
    assert jax.tree.leaves(params)[0].shape[0] == (groups or layers)
    jax.eval_shape(lambda p: made.apply({"params": p}, X, None, (1.0,)), params)
    assert seen == [tuple(order)]
