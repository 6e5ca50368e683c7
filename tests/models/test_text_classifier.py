"""The text classifiers: padding changes nothing, each part equals its formula, gradients flow where they should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.models.text_classifier import KINDS, POOLINGS, TextClassifierConfig
from llm_jax.nn import paths

SIZES = dict(vocab_size=17, model_dim=5, hidden_dim=4, widths=(1, 2, 4), filters=3, labels=("a", "b", "c"))
CONFIGS = {pooling: TextClassifierConfig("lstm", **SIZES, pooling=pooling) for pooling in POOLINGS}
CONFIGS |= {
    "deep": TextClassifierConfig("lstm", **SIZES, num_layers=2),
    "cnn": TextClassifierConfig("cnn", **SIZES),
    "projected": TextClassifierConfig("cnn", **SIZES, embedding_dim=7),
    "channels": TextClassifierConfig("cnn", **SIZES, two_channels=True, max_norm=0.7),
}
TEXTS = [[3, 1, 4, 1, 5, 9], [2, 6], [7], []]
IDS = np.array([t + [0] * (6 - len(t)) for t in TEXTS], np.int32)
LONGER = np.array([t + [0] * (9 - len(t)) for t in TEXTS], np.int32)
GARBAGE = np.array([t + [16] * (9 - len(t)) for t in TEXTS], np.int32)  # words that the mask hides
LEFT = np.array([[0] * (9 - len(t)) + t for t in TEXTS], np.int32)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@functools.cache
def params_of(name):
    return random_params(CONFIGS[name].make(), IDS)


@functools.cache
def results(name):
    model = CONFIGS[name].make()

    @jax.jit
    def run(params):
        apply = lambda ids, mask=None: model.apply({"params": params}, ids, mask)

        def loss(params):
            return jnp.sum(jnp.square(model.apply({"params": params}, LONGER).logits[:3]))

        return dict(
            out=apply(IDS), longer=apply(LONGER), left=apply(LEFT),
            hidden=apply(GARBAGE, LONGER > 0), gradient=jax.grad(loss)(params),
        )  # fmt: skip

    return jax.device_get(run(params_of(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    found = results(name)
    assert found["out"].logits.shape == (4, 3) and found["out"].logits.dtype == np.float32
    for other in ("longer", "left", "hidden"):
        close(found[other].logits, found["out"].logits, err_msg=other)
    assert np.isfinite(found["out"].logits).all()
    assert len({tuple(row) for row in found["out"].logits.tolist()}) == 4  # every text gives its own


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_flow_to_all_but_padding_and_absent_words(name):
    for path, gradient in paths.flatten(results(name)["gradient"]):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
    rows = np.abs(results(name)["gradient"]["embed"]["embedding"]).max(1) > 0
    assert not rows[0] and not rows[[8, 10, 11, 16]].any() and rows[[1, 3, 4, 5, 9, 2, 6, 7]].any()


def test_attention_weights_sum_to_one_over_words():
    (w_B11T,) = results("attention")["longer"].attentions
    assert w_B11T.shape == (4, 1, 1, 9)
    close(w_B11T.sum(-1).ravel(), [1, 1, 1, 0])
    assert (w_B11T[:, 0, 0][LONGER == 0] == 0).all() and (w_B11T[:, 0, 0][LONGER > 0] > 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_equal_their_formulas(pooling):
    out, tree = results(pooling)["out"], params_of(pooling)
    for states, got, text in zip(out.last_hidden_state, out.pooler_output, TEXTS, strict=True):
        assert (states[len(text) :] == 0).all()
        if not text:
            assert (got == 0).all()
            continue
        h_TD = states[: len(text)]
        if pooling == "attention":
            key, query = (tree["lstm"]["pool"][name] for name in ("key", "query"))
            scores = np.tanh(h_TD @ key["kernel"] + key["bias"]) @ query["kernel"][:, 0]
            w_T = np.exp(scores - scores.max())
            want = w_T @ h_TD / w_T.sum()
        elif pooling == "last":
            want = np.concatenate([h_TD[-1, :4], h_TD[0, 4:]])
        else:
            want = h_TD.max(0) if pooling == "max" else h_TD.mean(0)
        close(got, want)


def test_convolutions_equal_sums_over_windows():
    tree = params_of("cnn")
    for text, got in zip(TEXTS[:3], results("cnn")["out"].pooler_output, strict=False):
        want = []
        for width in (1, 2, 4):
            layer = tree["cnn"][f"filters_{width}"]
            kernel = np.asarray(layer["kernel"]).reshape(width, 5, 3)
            x = np.zeros((len(text) + 2 * (width - 1), 5))
            x[width - 1 : width - 1 + len(text)] = np.asarray(tree["embed"]["embedding"])[text]
            for k in range(3):
                signal = sum(np.correlate(x[:, d], kernel[:, d, k], "valid") for d in range(5))
                want.append(max(0, (signal + np.asarray(layer["bias"])[k]).max()))
        close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_the_first_parameters(kind):
    config = TextClassifierConfig(kind, **SIZES, input_dropout=0.5)
    model = config.make()
    table = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))["params"]["embed"]["embedding"]
    assert table.value.shape == (17, 5) and table.names == ("vocab", "embed")
    params = {"params": params_of("cnn" if kind == "cnn" else "attention")}
    draw = jax.jit(lambda key: model.apply(params, IDS, train=True, rngs={"dropout": key}).logits)
    assert (draw(jax.random.key(0)) == draw(jax.random.key(0))).all()
    assert (draw(jax.random.key(0))[:3] != draw(jax.random.key(1))[:3]).any()


def test_weights_of_a_class_are_no_longer_than_their_bound():
    tree, out = params_of("channels"), results("channels")["out"]
    kernel, bias = (np.asarray(tree["classifier"][name], np.float64) for name in ("kernel", "bias"))
    lengths = np.linalg.norm(kernel, axis=0)
    assert (lengths > 0.7).any()
    close(out.logits, out.pooler_output @ (kernel * np.minimum(1, 0.7 / lengths)) + bias)
    free = dataclasses.replace(CONFIGS["channels"], max_norm=0.0)
    bound = dataclasses.replace(free, max_norm=float(lengths.max()) + 1)
    params = {"params": tree}
    close(bound.make().apply(params, IDS).logits, free.make().apply(params, IDS).logits)
    close(free.make().apply(params, IDS).logits, out.pooler_output @ kernel + bias)


def test_channels_are_read_side_by_side():
    """The filters see a word's row of either table, so an exchange of tables and of kernels' halves changes nothing."""
    tree = params_of("channels")
    kernels = {}
    for name, layer in tree["cnn"].items():
        width = int(name.rpartition("_")[2])
        halves = layer["kernel"].reshape(width, 2, 5, 3)[:, ::-1].reshape(-1, 3)
        kernels[name] = {**layer, "kernel": halves}
    other = {**tree, "cnn": kernels, "embed": tree["embed_static"], "embed_static": tree["embed"]}
    close(CONFIGS["channels"].make().apply({"params": other}, IDS).logits, results("channels")["out"].logits)


def test_a_fresh_table():
    from llm_jax.models.text_classifier import _table

    rows = np.asarray(_table(jax.random.key(0), (500, 4)))
    assert (rows[0] == 0).all() and np.abs(rows).max() <= 0.25 and rows.std() == pytest.approx(0.25 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kind="gru"), "kind='gru' is not one of lstm, cnn"),
        (dict(pooling="sum"), "pooling='sum' is not one of attention, max, mean, last"),
        (dict(hidden_dim=0), "hidden_dim=0 must be at least 1"),
        (dict(embedding_dim=0), "embedding_dim=0 must be at least 1"),
        (dict(widths=()), r"widths=\(\) must be whole numbers from 1"),
        (dict(widths=(3, 3)), "all different"),
        (dict(max_norm=float("nan")), "max_norm=nan must be a number from 0"),
        (dict(dropout=1.0), r"dropout=1.0 must lie in \[0, 1\)"),
        (dict(labels=("one",)), "must name two classes or more"),
    ],
)
def test_bad_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        TextClassifierConfig(**changes)


def test_bad_calls():
    model, params = CONFIGS["cnn"].make(), {"params": params_of("cnn")}
    with pytest.raises(ValueError, match="attention_mask must be"):
        model.apply(params, IDS, np.ones((4, 3)))
    with pytest.raises(ValueError, match="train=True needs a dropout key"):
        model.apply(params, IDS, train=True)
    with pytest.raises(ValueError, match="input_ids must be"):
        model.apply(params, np.zeros((2, 3)))
