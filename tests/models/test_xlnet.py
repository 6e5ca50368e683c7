"""XLNet: who sees whom in any order, padding, memories, and the forms that must agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import V, abstract, model_params

from llm_jax.models.xlnet import XLNetConfig
from llm_jax.nn import weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.relations import distance_encodings
from llm_jax.nn.relative import shift
from llm_jax.nn.stack import unstack
from llm_jax.objectives.permutation_lm import hidden

TINY = XLNetConfig(vocab_size=V, model_dim=12, num_layers=3, num_heads=3, hidden_dim=10, vocab_pad_multiple=8)
T, K, PAD = 8, 3, 2
RNG = np.random.default_rng(0)
IDS = np.stack([RNG.permutation(V)[:T] for _ in range(2)])
TYPES = RNG.integers(0, 2, (2, T))
TARGETS = np.array([[2, 5, 6], [1, 3, 7]])
RANKS = np.array([[2, 0, 1], [1, 2, 0]])
ORDER = np.full((2, T), -1)
np.put_along_axis(ORDER, TARGETS, RANKS, 1)
PERM = np.asarray(jax.vmap(hidden)(ORDER))
CALL = dict(token_type_ids=TYPES, perm_mask=PERM, target_positions=TARGETS)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def params_of(**changes):
    return model_params(dataclasses.replace(TINY, **changes))


@functools.cache
def results():
    model, params = TINY.make(), params_of()

    @jax.jit
    def run(params):
        apply = lambda ids, p=params, **kw: model.apply({"params": p}, ids, **{**CALL, **kw})
        by_table = lambda table: {**params, "embed": {"embedding": table}}
        table = params["embed"]["embedding"]
        query = jax.jacobian(lambda t: apply(IDS, by_table(t)).last_hidden_state[0].sum(-1))(table)
        alone = dict(target_positions=None)
        content = jax.jacobian(lambda t: apply(IDS, by_table(t), **alone).last_hidden_state[0].sum(-1))(table)
        pad = lambda x, value: np.pad(x, ((0, 0), (PAD, 0)), constant_values=value)
        wide = np.pad(PERM, ((0, 0), (PAD, 0), (PAD, 0)))
        left = dict(
            token_type_ids=pad(TYPES, 1), perm_mask=wide, target_positions=TARGETS + PAD,
            attention_mask=pad(np.ones_like(IDS), 0),
        )  # fmt: skip
        return dict(
            out=apply(IDS, output_hidden_states=True, output_attentions=True),
            query=jnp.abs(query).sum(-1),
            content=jnp.abs(content).sum(-1),
            left=apply(pad(IDS, 9), **left).logits,
            mapped=apply(IDS, target_positions=None, target_mapping=np.eye(T)[TARGETS]).logits,
            unstacked=apply(IDS, unstack(params)).logits,
            nothing=apply(IDS, attention_mask=np.zeros_like(IDS)).logits,
        )

    return jax.device_get(run(params))


def test_sizes():
    d, f, n = 12, 10, 3
    layer = 5 * d * d + 3 * d + 2 * d + (d * f + f) + (f * d + d) + 2 * 2 * d
    params, axes = abstract(TINY.make(), IDS)
    assert weights.count(params) == 32 * d + d + 3 * layer + 32 and n == TINY.num_heads
    names = jax.tree.map(tuple, axes, is_leaf=lambda a: isinstance(a, weights.Axes))
    assert names["encoder"]["layers"]["attention"]["position"]["kernel"] == ("layers", "embed", "heads")


def test_outputs():
    out = results()["out"]
    assert out.logits.shape == (2, K, 32) and out.last_hidden_state.shape == (2, K, 12)
    assert [h.shape for h in out.hidden_states] == [(2, T, 12)] * 4
    assert [a.shape for a in out.attentions] == [(2, 3, T, T)] * 3
    close(np.stack(out.attentions).sum(-1), 1)
    assert np.isfinite(out.logits).all() and out.cache is None


def test_a_target_sees_the_context_and_what_comes_before_it_in_the_order():
    """Exactly, by gradient: tokens that come later, and the target's own, leave it untouched."""
    for k, place in enumerate(TARGETS[0]):
        for j in range(T):
            before = ORDER[0, j] < ORDER[0, place]
            assert (results()["query"][k, IDS[0, j]] > 1e-7) == before, (place, j)
    others = np.setdiff1d(IDS[1], IDS[0])
    assert (results()["query"][:, others] == 0).all()


def test_the_content_stream_sees_itself_too():
    for i in range(T):
        for j in range(T):
            assert (results()["content"][i, IDS[0, j]] > 1e-7) == (not PERM[0, i, j] or i == j), (i, j)


def test_padding_and_forms_change_nothing():
    r = results()
    close(r["left"], r["out"].logits)
    close(r["mapped"], r["out"].logits)
    close(r["unstacked"], r["out"].logits)
    assert np.isfinite(r["nothing"]).all()  # rows of nothing but padding


@pytest.mark.parametrize("kind", ["chunked", "reference"])
def test_attention_implementations_agree(kind):
    model = TINY.make(Execution(attention=kind))
    close(jax.jit(lambda p: model.apply({"params": p}, IDS, **CALL).logits)(params_of()), results()["out"].logits)


def test_a_memory_is_the_text_before():
    """In one direction, with room for all, a row and its memory are one longer row; forgetting begins behind that."""
    config = dataclasses.replace(TINY, causal_mask=True, memory_length=8)
    run = jax.jit(lambda p, ids, c: config.make().apply({"params": p}, ids, cache=c))
    whole = run(params_of(), IDS, None).logits
    cache = config.init_carry(2)
    first = run(params_of(), IDS[:, :3], cache)
    second = run(params_of(), IDS[:, 3:6], first.cache)
    third = run(params_of(), IDS[:, 6:], second.cache)
    close(np.concatenate([x.logits for x in (first, second, third)], axis=1), whole)
    assert second.cache.length_B.tolist() == [6, 6] and third.cache.length_B.tolist() == [8, 8]
    short = dataclasses.replace(config, memory_length=2)
    cache = short.init_carry(2).replace(length_B=np.array([2, 2]))
    cache = cache.replace(layers=tuple(m[:, -2:] for m in second.cache.layers))
    run = jax.jit(lambda p, ids, c: short.make().apply({"params": p}, ids, cache=c))
    again = run(params_of(), IDS[:, 6:], cache)
    assert not np.allclose(again.logits, third.logits) and again.cache.layers[0].shape == (2, 2, 12)


def test_memories_are_not_differentiated_and_rows_have_their_own():
    config = dataclasses.replace(TINY, memory_length=4, reuse_length=3)
    model = config.make()

    def after(params):
        cache = model.apply({"params": params}, IDS, cache=config.init_carry(2)).cache
        return sum(jnp.sum(m) for m in cache.layers), cache

    (_, cache), grads = jax.jit(jax.value_and_grad(after, has_aux=True))(params_of())
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    assert cache.length_B.tolist() == [3, 3]  # of eight states the first three are reused
    embedded = params_of()["embed"]["embedding"][IDS[:, :3]]
    close(cache.layers[0][:, -3:], embedded)
    assert (np.asarray(cache.layers[0])[:, :1] == 0).all()


def test_backwards_rows_are_forward_rows_reversed():
    """A reversed text gives the forward row's outputs, reversed, wherever in the batch it stands."""
    ids = np.stack([IDS[0, ::-1], IDS[0], IDS[1]])
    run = jax.jit(lambda p, flags: TINY.make().apply({"params": p}, ids, backwards=flags).logits)
    logits = run(params_of(), np.array([True, False, False]))
    close(logits[0, ::-1], logits[1])
    close(logits[1:], jax.jit(lambda p: TINY.make().apply({"params": p}, ids[1:]).logits)(params_of()))
    assert np.abs(run(params_of(), np.zeros(3, bool))[0, ::-1] - logits[1]).max() > 1e-3


def test_distances_by_hand():
    table = distance_encodings(2, 3, 4, None, True)
    assert table.shape == (2, 5, 4)
    close(table[0, :, 0], np.sin([3, 2, 1, 0, -1]))
    close(table[1, :, 2], np.cos([-3, -2, -1, 0, 1]))
    close(distance_encodings(2, 3, 4, 1, False)[0, :, 0], np.sin([1, 1, 1, 0, -1]))
    x = np.array([3.0, 2, 1, 0, -1]) * np.ones((1, 1, 2, 1))  # what each column holds is its distance
    assert np.asarray(shift(jnp.asarray(x), 3))[0, 0].tolist() == [[1, 0, -1], [2, 1, 0]]


LENGTHS = np.array([T, 5])
REAL = np.arange(T) < LENGTHS[:, None]


@functools.cache
def read():
    """Rows of 8 and 5 tokens read from left to right: at once, and a ragged prompt of 3, then one token a time."""
    config = dataclasses.replace(TINY, clamp_length=6)
    model = config.make()
    left = np.zeros((2, PAD + T), np.int32), np.zeros((2, PAD + T), bool)
    for b, n in enumerate(LENGTHS):
        left[0][b, -n:], left[1][b, -n:] = IDS[b, :n], True
    ids, real = left

    @jax.jit
    def run(params):
        apply = lambda *a, p=params, **kw: model.apply({"params": p}, *a, **kw)
        whole = apply(IDS, left_to_right=True)
        by_table = lambda t: apply(IDS, p={**params, "embed": {"embedding": t}}, left_to_right=True).last_hidden_state
        seen = jax.jacobian(lambda t: by_table(t)[0].sum(-1))(params["embed"]["embedding"])
        # the order of the permutations that is left to right: position i is predicted from those before it
        order = dict(perm_mask=np.triu(np.ones((2, T, T))), target_positions=np.tile(np.arange(1, T), (2, 1)))
        permuted = apply(IDS, **order)
        first = PAD + T - LENGTHS.max() + 3
        out = apply(ids[:, :first], real[:, :first], cache=config.init_cache(2, T + 1))

        def step(cache, x):
            out = apply(x[0][:, None], x[1][:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        cache, rest = jax.lax.scan(step, out.cache, (ids[:, first:].T, real[:, first:].T))
        steps = [out.logits, rest.swapaxes(0, 1)]
        return dict(
            whole=whole.logits,
            seen=jnp.abs(seen).sum(-1),
            permuted=permuted.logits,
            steps=jnp.concatenate(steps, axis=1),
            length=cache.length_B,
            left=apply(ids, real, left_to_right=True).logits,
            right=apply(np.where(REAL, IDS, 7), REAL, left_to_right=True).logits,
        )

    return jax.device_get(run(params_of()))


def test_left_to_right_is_an_order():
    r = read()
    close(r["permuted"], r["whole"][:, :-1])
    for t in range(T):
        for j in range(T):
            assert (r["seen"][t, IDS[0, j]] > 1e-7) == (j <= t), (t, j)


def test_decoding_equals_one_pass():
    r = read()
    for b, n in enumerate(LENGTHS):
        for name in ("steps", "left"):
            close(r[name][b, -n:], r["whole"][b, :n], err_msg=name)
        close(r["right"][b, :n], r["whole"][b, :n])
    assert r["length"].tolist() == LENGTHS.tolist()


def test_the_scanned_form_decodes_too():
    def run(params):
        cache = TINY.init_cache(2, T)
        out = TINY.make().apply({"params": params}, IDS[:, :4], cache=cache)
        return TINY.make().apply({"params": params}, IDS[:, 4:], cache=out.cache).logits

    close(jax.jit(run)(params_of()), jax.jit(lambda p: run(unstack(p)))(params_of()))


@pytest.mark.parametrize(
    "changes, call, words",
    [
        ({}, dict(left_to_right=True, perm_mask=PERM), "left_to_right is an order of its own: no perm_mask, targets"),
        ({"head": "tokens"}, dict(left_to_right=True), "reads from left to right with head='lm'"),
        ({}, dict(perm_mask=PERM[:, :3]), r"perm_mask must be \[2, 8, 8\], got \[2, 3, 8\]"),
        ({}, dict(target_mapping=np.ones((2, 3, 4))), r"target_mapping must be \[2, K, 8\], got \[2, 3, 4\]"),
        ({}, dict(attention_mask=np.ones(8)), r"attention_mask must be \[B, T\]"),
        ({}, dict(train=True), "train=True needs a dropout key"),
        ({}, dict(backwards=np.ones(3, bool)), r"backwards must be \[2\], one flag a row, got \[3\]"),
        (
            {},
            dict(left_to_right=True, backwards=np.ones(2, bool)),
            "no perm_mask, targets, token_type_ids or backwards",
        ),
    ],
)
def test_calls_refused(changes, call, words):
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: config.make().apply({"params": params_of()}, **{"input_ids": IDS, **call}))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"head": "masked_lm"}, "head='masked_lm' is not one of none, lm"),
        ({"activation": "swish"}, "activation='swish' is not one of"),
        ({"memory_length": -1}, "memory_length=-1 and reuse_length=None must be positive"),
        ({"num_heads": 5}, "model_dim=12 is not a multiple of num_heads=5"),
    ],
)
def test_configs_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **fields)
