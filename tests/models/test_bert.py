"""Encoders: one table, many properties; each compiles once and every property reads the results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, ENCODERS, V, abstract, count_bert, model_params

from llm_jax.models.bert import BertConfig
from llm_jax.nn import weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import unstack

T, PAD = 7, 3
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (2, T))
REAL = np.array([[1] * T, [1] * (T - 2) + [0] * 2], bool)
TYPES = RNG.integers(0, 2, (2, T))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def left(x):
    out = np.zeros((2, PAD + T), x.dtype)
    for b in range(2):
        n = REAL[b].sum()
        out[b, PAD + T - n :] = x[b, :n]
    return out


@functools.cache
def results(name):
    config = ENCODERS[name]
    model, params = config.make(), model_params(config)
    types = TYPES if config.num_token_types == 2 else None
    packed = np.concatenate([IDS[0], IDS[1, :5]])[None]
    packed_types = None if types is None else np.concatenate([TYPES[0], TYPES[1, :5]])[None]
    segments = np.array([[1] * T + [2] * 5])

    @jax.jit
    def run(params):
        apply = lambda *a, p=params, **kw: model.apply({"params": p}, *a, **kw)
        out = apply(IDS, REAL, types, output_hidden_states=True, output_attentions=True)
        influence = jax.jacobian(
            lambda table: apply(IDS, p={**params, "embed": {"embedding": table}}).last_hidden_state[0].sum(-1)
        )(params["embed"]["embedding"])
        padded = apply(left(IDS), left(REAL), None if types is None else left(TYPES))
        nothing = apply(IDS, np.zeros_like(REAL), types)
        return dict(
            out=out,
            influence=jnp.abs(influence).sum(-1),
            left=padded,
            packed=apply(packed, None, packed_types, segment_ids=segments).last_hidden_state,
            unstacked=apply(IDS, REAL, types, p=unstack(params)).last_hidden_state,
            nothing=(nothing.last_hidden_state, nothing.logits),
        )

    return jax.device_get(run(params))


@pytest.fixture(params=ENCODERS)
def name(request):
    return request.param


def test_sizes_and_axes(name):
    config = ENCODERS[name]
    params, axes = abstract(config.make(), IDS)
    assert weights.count(params) == count_bert(config)
    names = jax.tree.map(tuple, axes, is_leaf=lambda a: isinstance(a, weights.Axes))
    assert names["encoder"]["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads")


def test_outputs(name):
    config, out = ENCODERS[name], results(name)["out"]
    rows = -(-V // config.vocab_pad_multiple) * config.vocab_pad_multiple
    assert out.logits.shape == (2, T, rows) and out.head_input.shape == (2, T, config.embedding_dim or 12)
    assert [h.shape for h in out.hidden_states] == [(2, T, 12)] * (config.num_layers + 1)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    close(np.stack(out.attentions).sum(-1), 1)
    assert (out.pair_logits is not None) == (out.pooler_output is not None) == (config.head == "pretraining")
    assert np.isfinite(out.logits).all() and out.cache is None
    assert (np.stack(out.attentions)[:, 1, :, :, 5:] == 0).all()  # padding gets no attention


def test_every_token_sees_every_token_of_its_row(name):
    influence = results(name)["influence"]  # [T, V]
    for t in range(T):
        assert (influence[t, IDS[0]] > 1e-6).all()
    others = np.setdiff1d(IDS[1], IDS[0])
    assert (influence[:, others] == 0).all()


def test_padding_changes_nothing(name):
    r = results(name)
    for b in range(2):
        n = REAL[b].sum()
        close(r["left"].last_hidden_state[b, PAD + T - n :], r["out"].last_hidden_state[b, :n])
    hidden, logits = r["nothing"]
    assert np.isfinite(hidden).all() and np.isfinite(logits).all()  # rows of nothing but padding


def test_packed_documents_equal_separate_ones(name):
    r = results(name)
    close(r["packed"][0, T:], r["out"].last_hidden_state[1, :5])


def test_stacked_equals_unstacked(name):
    close(results(name)["unstacked"], results(name)["out"].last_hidden_state)


def test_albert_is_bert_with_tied_layers_behind_a_projection():
    albert = ENCODERS["albert"]
    params = model_params(albert)
    groups = [0, 0, 1]  # layer l of 3 uses set l * 2 // 3
    layers = jax.tree.map(lambda x: x[np.array(groups)], params["encoder"]["layers"])
    untied = dataclasses.replace(albert, num_groups=None)
    run = lambda c, p: jax.jit(lambda p: c.make().apply({"params": p}, IDS, REAL, TYPES).logits)(p)
    close(run(untied, {**params, "encoder": {"layers": layers}}), results("albert")["out"].logits)


def test_chunked_and_reference_attention_agree():
    config = ENCODERS["bert"]
    params = model_params(config)
    run = lambda kind: jax.jit(
        lambda p: config.make(Execution(attention=kind)).apply({"params": p}, IDS, REAL, TYPES).last_hidden_state
    )(params)
    want = results("bert")["out"].last_hidden_state
    close(run("chunked"), want)
    close(run("reference"), want)


HEADS = {"classification": (2, 3), "tokens": (2, T, 3), "span": (2, T, 2), "none": None}


@pytest.mark.parametrize("head", HEADS)
def test_heads_have_their_shapes(head):
    config = BertConfig(**BERT, head=head, labels=("a", "b", "c"))
    out = jax.eval_shape(lambda p: config.make().apply({"params": p}, IDS, REAL), abstract(config.make(), IDS)[0])
    assert (None if out.logits is None else out.logits.shape) == HEADS[head]


def test_choices_and_spans():
    config = BertConfig(**BERT, head="choice")
    params, ids = model_params(config), RNG.integers(0, V, (2, 4, T))
    run = jax.jit(lambda ids: config.make().apply({"params": params}, ids).logits)
    close(run(ids)[1], run(ids[1]))  # a row's score depends on that row alone
    config = BertConfig(**BERT, head="span")
    params = model_params(config)
    logits = jax.jit(lambda: config.make().apply({"params": params}, IDS, REAL).logits)()
    assert (np.asarray(logits)[1, 5:] < -1e29).all() and np.isfinite(logits).all()


def test_token_types_that_a_program_closes_over_are_checked():
    config = ENCODERS["bert"]
    params, types = model_params(config), jnp.asarray(TYPES)
    run = lambda types: jax.eval_shape(lambda: config.make().apply({"params": params}, IDS, None, types).logits)
    run(types)
    with pytest.raises(ValueError, match="token_type_ids hold 2"):
        run(types + 1)


def test_dropout_needs_a_key_and_changes_the_output():
    config = ENCODERS["bert"]
    params = model_params(config)
    run = jax.jit(lambda key: config.make().apply({"params": params}, IDS, train=True, rngs={"dropout": key}).logits)
    a, b, c = (run(jax.random.key(s)) for s in (0, 0, 1))
    assert (a == b).all() and not np.allclose(a, c)


@pytest.mark.parametrize(
    "changes, call, words",
    [
        ({}, dict(token_type_ids=TYPES + 1), "token_type_ids hold 2; the model has 2 types"),
        ({}, dict(token_type_ids=TYPES - 1), "token_type_ids hold -1; the model has 2 types"),
        ({"num_token_types": 0}, dict(token_type_ids=TYPES), "has no token types"),
        ({}, dict(attention_mask=REAL[0]), r"attention_mask must be \[B, T\] like input_ids \[2, 7\], got \[7\]"),
        ({}, dict(attention_mask=REAL[:, None]), r"got \[2, 1, 7\]"),
        ({}, dict(cache=1), "is not a decoder and takes no cache"),
        ({}, dict(train=True), "train=True needs a dropout key"),
        (
            {},
            dict(input_ids=np.zeros((1, 17), np.int32)),
            "sequence of 17 tokens is longer than the model's context of 16",
        ),
    ],
)
def test_calls_refused(changes, call, words):
    config = BertConfig(**{**BERT, **changes})
    with pytest.raises(ValueError, match=words):
        config.make().apply({"params": model_params(config)}, **{"input_ids": IDS, **call})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_heads": 5}, "model_dim=12 is not a multiple of num_heads=5"),
        ({"head": "next"}, "head='next' is not one of none, masked_lm"),
        ({"pooler": "gelu"}, "pooler='gelu' is not one of tanh, relu, None"),
        ({"pooler": None}, "head='pretraining' needs a pooler"),
        ({"num_groups": 4}, r"num_groups=4 must lie in 1..num_layers=3"),
        ({"num_groups": 2, "group_size": 2}, "group_size=2 must divide num_layers=3 and num_groups=2"),
        ({"group_size": 3}, "group_size=3 needs num_groups"),
        ({"causal": True}, "causal=True takes head='masked_lm' or 'none', not 'pretraining'"),
        ({"activation": "swish"}, "activation='swish' is not one of"),
    ],
)
def test_configs_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        BertConfig(**{**BERT, **fields})
