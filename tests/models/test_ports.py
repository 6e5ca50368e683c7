"""Three published placements of adapters in every family: reached by gradients, stacked as unstacked, remat or not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_families import ROWS
from tiny_models import model_params, random_params

from llm_jax.models import parameters
from llm_jax.models.shared.block import BlockConfig, Shared, blocks
from llm_jax.nn import paths, ports, weights
from llm_jax.nn.attend import Mask, drop
from llm_jax.nn.attention import Attention, AttentionConfig, View
from llm_jax.nn.execution import Execution
from llm_jax.nn.feed_forward import FeedForward
from llm_jax.nn.norms import LayerNorm
from llm_jax.nn.stack import unstack
from llm_jax.training.trainable import combine, partition

RNG = np.random.default_rng(0)
RANK, RATE = 3, 0.2


class Bottleneck(ports.PortNode):
    """Down, activation and up."""

    down: Any
    up: Any

    def inner(self, x):
        return jnp.tanh(x @ self.down) @ self.up


class Houlsby(Bottleneck):
    """On the output; drops out inside, to use its key."""

    def __call__(self, x, residual, norm, key):
        return x + self.inner(x if key is None else drop(x, RATE, key))


class Pfeiffer(Bottleneck):
    """On the sum, behind the block's norm."""

    def __call__(self, x, residual, norm, key):
        return x + self.inner(norm(x + residual))


class Parallel(Bottleneck):
    """From the stream before the sublayer and before its norm."""

    def __call__(self, x, residual, norm, key):
        return self.inner(residual)


KINDS = {
    "attention/adapter": Houlsby,
    "cross_attention/adapter": Pfeiffer,
    "mlp/adapter": Pfeiffer,
    "attention/parallel_adapter": Parallel,
    "cross_attention/parallel_adapter": Parallel,
    "mlp/parallel_adapter": Parallel,
}


def node_of(port, dim, *lead):
    rng = np.random.default_rng(list(KINDS).index(port))
    draw = lambda *shape: rng.normal(size=(*lead, *shape)).astype(np.float32) * 0.3
    return KINDS[port](draw(dim, RANK), draw(RANK, dim))


def attach(params, dim):
    """A node at every port of a stacked tree."""
    found = dict(paths.flatten(params))
    for path, x in list(found.items()):
        for name in ports.SUBLAYERS:
            head, inside, _ = path.partition(f"/layers/{name}/")
            for port in ports.PORTS if inside else ():
                found.setdefault(f"{head}{inside}{port}", node_of(f"{name}/{port}", dim, x.shape[0]))
    return paths.nested(found.items())


FAMILIES = [name for name in ROWS if "," not in name and name != "elmo"]  # heads are above; ELMo has no block


FEW = ("gpt", "transformer", "xlnet")  # tests/parity/test_delta_runs.py has the others


@functools.cache
def started(name):
    config = ROWS[name].config
    return attach(model_params(config, std=0.2), config.model_dim)


def loss_of(name, execution, prepare=lambda p: p):
    """A function of (nodes, the rest): a sum of the last states, with dropout inside nodes."""
    row = ROWS[name]
    model, objective = row.config.make(execution), row.objective.for_run(1, row.config, 3)

    def loss(nodes, rest):
        inputs = objective.prepare(row.batch, jax.random.key(1)).inputs
        params, rngs = prepare(combine(nodes, rest)), {"dropout": jax.random.key(2)}
        return jnp.sum(jnp.sin(model.apply({"params": params}, **inputs, train=True, rngs=rngs).last_hidden_state))

    return loss


@pytest.mark.parametrize("name", FEW)
def test_gradients_reach_every_node_stacked_as_unstacked_and_recomputed(name):
    parameters.check(ROWS[name].config.make(), started(name))
    parts = partition(started(name), "*adapter/*")
    value, plain = jax.device_get(jax.jit(jax.value_and_grad(loss_of(name, Execution())))(*parts))
    again = jax.device_get(jax.jit(jax.grad(loss_of(name, Execution(remat="full"))))(*parts))
    np.testing.assert_allclose(jax.jit(loss_of(name, Execution(), unstack))(*parts), value, rtol=1e-4)
    found = paths.flatten(plain)
    assert len(found) == 4 * (5 if name in ("transformer", "t5") else 2)
    for (path, a), b in zip(found, jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=path)
        assert all(np.abs(layer).max() > 0 for layer in a), path


DIM, AT = 6, np.broadcast_to(np.arange(3, dtype=np.int32), (2, 3))
ATTENTION = AttentionConfig(DIM, 2, 2, 3)
VIEW = View(Mask(AT, AT))
X = RNG.normal(size=(2, 3, DIM)).astype(np.float32)


def one_block(norm, dropout=0.0, cross=False):
    """(a block whose layer axis is 1, its parameters)."""
    config = BlockConfig(ATTENTION, 8, "relu", norm=norm, dropout=dropout, cross=cross)
    stack = blocks(config, 1, Execution(), False, False, None)
    shared = Shared(VIEW, VIEW.replace(source_BSD=X[:, ::-1]) if cross else None)
    run = lambda params, **kwargs: stack.apply({"params": params}, X, None, (shared,), **kwargs)[0]
    return run, random_params(stack, X, None, (shared,), std=0.4)


def with_nodes(params, nodes):
    return paths.nested([*paths.flatten(params), *((f"layers/{port}", node) for port, node in nodes.items())])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_placements_by_hand(norm):
    """A block with every node equals its sublayers, norms and nodes put together by hand."""
    run, params = one_block(norm, cross=True)
    nodes = {port: node_of(port, DIM, 1) for port in KINDS}
    layer, of_layer = jax.tree.map(lambda x: x[0], (params["layers"], nodes))

    def sublayer(name, x):
        if name == "mlp":
            return FeedForward(8, "relu").apply({"params": layer[name]}, x)
        view = VIEW.replace(source_BSD=X[:, ::-1]) if name == "cross_attention" else VIEW
        return Attention(ATTENTION).apply({"params": layer[name]}, x, view)[0]

    def by_hand(x):
        for name in ports.SUBLAYERS:
            normed = lambda z, name=name: LayerNorm(1e-5).apply({"params": layer[f"{name}_norm"]}, z)
            adapter, parallel = (of_layer[f"{name}/{port}"] for port in ports.PORTS)
            y = sublayer(name, normed(x) if norm == "pre" else x)
            y = y + adapter.inner(y if isinstance(adapter, Houlsby) else normed(x + y))
            x = x + y + parallel.inner(x)
            x = x if norm == "pre" else normed(x)
        return x

    got, want = jax.device_get(jax.jit(lambda: (run(with_nodes(params, nodes)), by_hand(X)))())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class Doubled(ports.PortNode):
    """Twice the output plus one, which shows where the block drops out."""

    one: Any

    def __call__(self, x, residual, norm, key):
        return 2 * x + self.one


def test_the_block_drops_out_before_a_node_and_not_after():
    run, params = one_block("pre", dropout=0.5)
    silent = weights.replace(params, "attention/out/kernel", lambda _, w: w * 0)
    silent = weights.replace(silent, "mlp/down/bias", lambda _, w: w * 0 + 3)
    silent = weights.replace(silent, "mlp/down/kernel", lambda _, w: w * 0)
    node = {"mlp/adapter": Doubled(np.ones(1, np.float32))}
    rngs = {"dropout": jax.random.key(0)}
    added = jax.jit(lambda p: run(p, train=True, rngs=rngs) - X)(with_nodes(silent, node))
    assert set(np.unique(np.round(added, 4))) == {1.0, 13.0}  # 3 becomes 0 or 6, and nothing drops the 1


def test_decoding_with_nodes_equals_teacher_forcing():
    config, params = ROWS["llama"].config, started("llama")
    model, ids = config.make(), ROWS["llama"].batch["input_ids"]

    @jax.jit
    def both(params):
        apply = lambda ids, **kwargs: model.apply({"params": params}, ids, **kwargs)
        first = apply(ids[:, :4], cache=config.init_cache(2, ids.shape[1]))

        def one(cache, token):
            out = apply(token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        rest = jax.lax.scan(one, first.cache, ids[:, 4:].T)[1]
        return apply(ids).logits, jnp.concatenate([first.logits, rest.swapaxes(0, 1)], axis=1)

    whole, steps = jax.device_get(both(params))
    np.testing.assert_allclose(steps, whole, rtol=1e-4, atol=1e-5)
