"""Rates by pattern and by depth equal optax's own groups, stacked as unstacked, wherever the state lies."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from plan_runs import MODELS_HERE, ROWS, STEPS, T, task
from tiny_models import ENCODER_DECODERS, ENCODERS, MODELS, model_params

from llm_jax import config as configs
from llm_jax.delta import lora
from llm_jax.models import parameters
from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import paths
from llm_jax.nn.stack import stack, unstack
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import rates
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import NAMES, OptimizerConfig, make_optimizer
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig
from llm_jax.training.trainable import partition

RNG = np.random.default_rng(0)
normal = lambda *shape: RNG.normal(size=shape).astype(np.float32)
TREE = {
    "embed": {"embedding": normal(5, 3)},
    "decoder": {
        "layers": {"up": {"kernel": normal(3, 3, 4), "bias": normal(3, 4)}, "norm": {"scale": normal(3, 3)}},
    },
    "head": {"kernel": normal(3, 5)},
}
GRADS = [jax.tree.map(lambda x: normal(*x.shape), TREE) for _ in range(2)]
RATES = ("up/*=2", "up/bias=16", "head/*=3")  # the second wins over the first
DECAY = 0.5


def factor(path):
    """By hand, of the unstacked tree."""
    by_pattern = 16 if path.endswith("up/bias") else 2 if "/up/" in path else 3 if path.startswith("head") else 1
    depth = {"embed": 4, "head": 0}.get(path.split("/")[0])
    return by_pattern * DECAY ** (3 - int(path.split("/")[2]) if depth is None else depth)


def config_of(name, rate=0.1, **fields):
    return OptimizerConfig(name, rate, "linear", weight_decay=0.0 if name == "adam" else 0.1, **fields)


def steps_of(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_an_optimizer_for_each_rate(name):
    """The unstacked tree with `optax.partition` over separate optimizers, and the stacked one."""
    config = config_of(name, rates=RATES, layer_decay=DECAY)
    split = unstack(TREE)
    labels = paths.map_with_path(lambda path, _: factor(path), split)
    groups = set(jax.tree.leaves(labels))
    alone = {f: make_optimizer(config_of(name, 0.1 * f), 9) for f in groups}

    @jax.jit
    def every(params, grads):
        by_hand = steps_of(optax.partition(alone, labels), unstack(params), list(map(unstack, grads)))
        apart = steps_of(make_optimizer(config, 9, unstack(params)), unstack(params), list(map(unstack, grads)))
        return stack(by_hand), stack(apart), steps_of(make_optimizer(config, 9, params), params, grads)

    want, apart, together = jax.device_get(every(TREE, GRADS))
    assert len(groups) == 9
    for (path, w), a, t, before in zip(
        paths.flatten(want), *map(jax.tree.leaves, (apart, together, TREE)), strict=True
    ):
        assert np.abs(w - before).min() > 0
        np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(t, w, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("unrolled", [False, True])
def test_lora_plus_by_depth(unrolled):
    """B of every LoRA at 16 times A's rate, both by depth; the base trains not and has no factor."""
    params = lora.attach(model_params(MODELS["llama"]), lora.LoraConfig(rank=2), jax.random.key(0))
    params = unstack(params) if unrolled else params
    config = OptimizerConfig("sgd", 1.0, "constant", b1=0.0, weight_decay=0.0, rates=("*/b=16",), layer_decay=DECAY)
    learn, _ = partition(params, lora.TRAINABLE)
    tx = make_optimizer(config, 9, params, lora.TRAINABLE)
    ones = jax.tree.map(np.ones_like, learn)
    updates = jax.device_get(jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(ones))
    for (path, u), x in zip(paths.flatten(stack(updates)), jax.tree.leaves(stack(ones)), strict=True):
        depth = DECAY ** np.array([2, 1]).reshape(2, 1, 1)
        np.testing.assert_allclose(u, -depth * (16 if path.endswith("/b") else 1) * x, err_msg=path)


def test_defaults_change_neither_state_nor_program():
    """States of before restore; without factors the optimizer is the very same, and with them its state is."""
    plain, scaled = (
        make_optimizer(OptimizerConfig(**f), 9, TREE) for f in ({}, {"rates": RATES, "layer_decay": DECAY})
    )
    same = lambda tx: jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, TREE))
    assert same(plain) == same(scaled)
    program = lambda tx: str(jax.make_jaxpr(lambda g, p: tx.update(g, tx.init(p), p))(TREE, TREE))
    assert program(plain) == program(make_optimizer(OptimizerConfig(), 9))


FAMILIES = {
    "gpt2": MODELS["gpt2"],
    **{name: ENCODERS[name] for name in ("bert", "albert")},
    **{name: ENCODER_DECODERS[name] for name in ("transformer", "t5_1.1")},
    "xlnet": XLNetConfig(vocab_size=31, model_dim=12, num_layers=2, num_heads=3, hidden_dim=10, head="classification"),
}
ABOVE = {  # what learns at the whole rate
    "gpt2": {"final_norm"},
    "bert": {"head", "pair", "pooler"},
    "albert": {"head", "pair", "pooler"},
    "transformer": set(),
    "t5_1.1": {"decoder_norm", "encoder_norm", "head"},
    "xlnet": {"pooler", "classifier"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_depth_of_every_familys_parameters(name):
    params, _ = parameters.declared(FAMILIES[name])
    factors = rates.factors_of((), DECAY, params)
    counts = {p.partition("/layers/")[0]: x.shape[0] for p, x in paths.flatten(params) if "/layers/" in p}
    above = set()
    for path, x in paths.flatten(params):
        depth = counts.get(path.partition("/layers/")[0])
        if path not in factors:
            above.add(path.split("/")[0])
        elif depth is None:
            assert factors[path] == DECAY ** (max(counts.values()) + 1), path
        else:
            np.testing.assert_array_equal(factors[path], DECAY ** np.arange(depth, 0.0, -1.0), err_msg=path)
            assert x.shape[0] == depth
    assert above == ABOVE[name]


def made(plan, optimizer, scratch=None, name="llama", **training):
    loop = LoopConfig(batch_size=ROWS, sequence_length=T, steps=STEPS, **training)
    model = MODELS_HERE[name]
    config = RunConfig(model, objective=task(name)[0], optimizer=optimizer, plan=plan, training=loop)
    devices = jax.devices()[:1] if plan.data == 1 and plan.pipe == 1 else None
    plan = Plan(plan, model, devices)
    return plan, build(config, plan, 3, parameters.declared(model)[0], scratch=scratch)


@functools.cache
def first(name):
    return model_params(MODELS_HERE[name], std=0.1)


def run(plan_config, optimizer, scratch=None, name="llama"):
    plan, program = made(plan_config, optimizer, scratch, name)
    state = program.init(jax.random.key(3), jax.device_put(jax.tree.map(np.copy, first(name)), program.given_placement))
    for batch in task(name)[1][:2]:
        state, _ = program.step(state, jax.device_put(batch, plan.batch_sharding()))
    return program, state


BOTH = OptimizerConfig(
    learning_rate=1e-2,
    schedule="constant",
    eps=1e-3,
    rates=("attention/*/kernel=3", "query/kernel=0.5"),
    layer_decay=DECAY,
)


@functools.cache
def one_device(name="llama"):
    return jax.device_get(run(PlanConfig(data=1), BOTH, name=name)[1].params)


@pytest.mark.parametrize(
    "plan, name",
    [
        (PlanConfig(data=1, offload=("update",)), "llama"),
        (PlanConfig(data=4, model=2, zero=3), "llama"),
        (PlanConfig(data=2, pipe=2, model=2, zero=1, microbatches=2), "llama"),
    ],
    ids=["update on the host", "ZeRO-3", "pipeline"],
)
def test_every_plan_equals_one_device(plan, name):
    got = jax.device_get(run(plan, BOTH, name=name)[1].params)
    for (path, a), b in zip(paths.flatten(got), jax.tree.leaves(one_device(name)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=path)


def test_rates_on_disk_equal_one_device(tmp_path):
    """Pieces know their paths, and so their patterns; they do not know their layer."""
    config = dataclasses.replace(BOTH, layer_decay=1.0)
    disk = run(PlanConfig(data=1, offload=("disk",)), config, tmp_path)[1]
    memory = run(PlanConfig(data=1), config)[1]
    for (path, a), b in zip(paths.flatten(disk.params), jax.tree.leaves(memory.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=path)
    with pytest.raises(
        ValueError, match="layer_decay=0.5 with plan.offload=disk, whose pieces do not know their layer"
    ):
        made(PlanConfig(data=1, offload=("disk",)), BOTH, tmp_path)


def test_a_checkpoint_of_before_goes_on_with_rates(tmp_path):
    _, before = made(PlanConfig(data=1), dataclasses.replace(BOTH, rates=(), layer_decay=1.0))
    state = before.init(jax.random.key(0), jax.tree.map(np.copy, first("llama")))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, {})
    checkpoints.close()
    _, program = made(PlanConfig(data=1), BOTH)
    back = Checkpoints(tmp_path).restore(program.shapes, 0, program.shardings).state
    for a, b in zip(jax.tree.leaves(back.opt_state), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_configs_come_back_from_json():
    assert configs.from_dict(OptimizerConfig, configs.to_dict(BOTH)) == BOTH


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rates": ("head/kernel",)}, "rates hold 'head/kernel', which is not of the form pattern=factor"),
        ({"rates": ("head/kernel=fast",)}, "rates hold 'head/kernel=fast', which is not of the form"),
        ({"rates": ("=2",)}, "rates hold '=2', which is not of the form"),
        ({"rates": ("head/*=0",)}, "with a positive factor .training.trainable chooses what does not learn"),
        ({"rates": ("head/*=nan",)}, "with a positive factor"),
        ({"layer_decay": 0.0}, r"layer_decay=0.0 must lie in \(0, 1\]"),
        ({"layer_decay": 1.5}, r"layer_decay=1.5 must lie in \(0, 1\]"),
    ],
)
def test_errors_of_a_config(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    "fields, trainable, words",
    [
        ({"rates": ("gate/kernel=2",)}, None, "optimizer.rates of what trains: pattern 'gate/kernel' matches no param"),
        ({"rates": ("mlp/*=2",)}, ("*norm*",), "optimizer.rates of what trains: pattern 'mlp/.' matches no parameter"),
        ({"layer_decay": 0.9}, ("final_norm/*",), "layer_decay=0.9 has no effect: nothing below the head trains"),
    ],
)
def test_errors_of_a_run(fields, trainable, words):
    optimizer = dataclasses.replace(BOTH, **{"rates": (), "layer_decay": 1.0, **fields})
    name = "gpt" if "gate" in words else "llama"
    with pytest.raises(ValueError, match=words):
        made(PlanConfig(data=1), optimizer, name=name, trainable=trainable)
    with pytest.raises(ValueError, match="need the parameters: pass params"):
        make_optimizer(optimizer, 9)
