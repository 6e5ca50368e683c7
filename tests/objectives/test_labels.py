"""Losses of labels by hand."""

import jax
import numpy as np
import pytest

from llm_jax.models.gpt import GPTConfig
from llm_jax.models.shared.output import Output
from llm_jax.objectives.labels import Labels
from llm_jax.objectives.objective import total_loss

RNG = np.random.default_rng(0)
B, T, C = 3, 5, 4
IDS = {"input_ids": np.zeros((B, T), np.int32)}
SPANS = np.array([[0, 4], [2, 3], [-100, 1]])
TAGS = np.array([[0, 3, -100, 1, 2], [1, -100, -100, -100, -100], [-100] * 5])
MANY = RNG.integers(0, 2, (B, C)).astype(np.float32)
NUMBERS = RNG.normal(size=B).astype(np.float32)


def logp(x):
    x = np.float64(x)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def picked(x, labels, smoothing=0.0):
    """Mean loss over labels that count."""
    kept = labels >= 0
    lp = logp(x)[kept]
    own = lp[np.arange(kept.sum()), labels[kept]]
    return float(-((1 - smoothing) * own + smoothing * lp.mean(-1)).mean()), int((lp.argmax(-1) == labels[kept]).sum())


def score(objective, logits, labels):
    def run(logits):
        prepared = objective.prepare({**IDS, "labels": labels}, jax.random.key(0))
        scores = objective.score(Output(logits=logits), prepared.targets)
        return total_loss(objective, scores, prepared.weights), scores, prepared

    loss, scores, prepared = jax.jit(run)(logits)
    np.testing.assert_array_equal(prepared.inputs["input_ids"], IDS["input_ids"])
    assert set(scores) == set(prepared.weights) >= set(objective.coefficients)
    return float(loss), scores


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "kind, shape, labels",
    [
        ("classification", (B, C), np.array([1, 3, -100])),
        ("choice", (B, C), np.array([1, 3, 0])),
        ("tokens", (B, T, C), TAGS),
    ],
)
def test_classes(kind, shape, labels, smoothing):
    logits = RNG.normal(size=shape).astype(np.float32)
    loss, scores = score(Labels(kind, smoothing), logits, labels)
    want, right = picked(logits, labels, smoothing)
    assert loss == pytest.approx(want, rel=1e-5) and float(scores["accuracy"]) == right


def test_spans_are_the_mean_of_both_ends():
    logits = RNG.normal(size=(B, T, 2)).astype(np.float32)
    loss, scores = score(Labels("span"), logits, SPANS)
    (start, right), (end, more) = (picked(logits[..., i], SPANS[:, i]) for i in (0, 1))
    assert loss == pytest.approx((start + end) / 2, rel=1e-5)
    assert float(scores["accuracy"]) == right + more


@pytest.mark.parametrize("kind", ["classification", "tokens", "span", "regression", "multi_label"])
def test_filler_rows_and_ends_behind_the_row_do_not_count(kind):
    shapes = {
        "classification": (B, C),
        "tokens": (B, T, C),
        "span": (B, T, 2),
        "regression": (B, 1),
        "multi_label": (B, C),
    }
    labels = {
        "classification": np.array([1, 3, 2]),
        "tokens": np.abs(TAGS) % C,
        "span": np.array([[0, 4], [2, 9], [1, 1]]),
        "regression": NUMBERS,
        "multi_label": MANY,
    }[kind]
    logits = RNG.normal(size=shapes[kind]).astype(np.float32)
    weights = np.ones((B, T), np.float32)
    weights[2] = 0

    def loss(rows, **extra):
        objective = Labels(kind)
        batch = {"input_ids": IDS["input_ids"][:rows], "labels": labels[:rows], **extra}
        prepared = objective.prepare(batch, jax.random.key(0))
        scores = objective.score(Output(logits=logits[:rows]), prepared.targets)
        return total_loss(objective, scores, prepared.weights)

    filled, alone, whole = jax.jit(lambda: (loss(3, loss_weights=weights), loss(2), loss(3)))()
    assert float(filled) == pytest.approx(float(alone), rel=1e-6)
    assert np.isfinite(whole)


def test_numbers_and_several_classes():
    logits = RNG.normal(size=(B, 1)).astype(np.float32)
    assert score(Labels("regression"), logits, NUMBERS)[0] == pytest.approx(
        np.mean((logits[:, 0] - NUMBERS) ** 2), rel=1e-5
    )
    logits = RNG.normal(size=(B, C)).astype(np.float32)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    want = -np.mean(MANY * np.log(p) + (1 - MANY) * np.log(1 - p))
    assert score(Labels("multi_label"), logits, MANY)[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"kind": "pairs"}, "kind='pairs' is not one of"),
        ({"label_smoothing": 1.0}, "in \\[0, 1\\)"),
        ({"kind": "span", "label_smoothing": 0.1}, "kind='span' has no label smoothing"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        Labels(**fields)


def test_the_models_head_must_be_the_kinds():
    for kind in ("classification", "regression", "multi_label"):
        labels = ("one",) if kind == "regression" else ("one", "two")
        assert Labels(kind).for_run(1, GPTConfig(head="classification", labels=labels), None) == Labels(kind)
    with pytest.raises(ValueError, match="needs model.head='span', not 'lm'"):
        Labels("span").for_run(1, GPTConfig(), None)
