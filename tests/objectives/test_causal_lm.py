"""Shifting, masks and totals by hand."""

import jax
import numpy as np
import pytest

from llm_jax.models.gpt import GPTConfig
from llm_jax.models.shared.output import Output
from llm_jax.nn.output import Head
from llm_jax.objectives.causal_lm import CausalLM
from llm_jax.objectives.objective import total_loss

IDS = np.array([[3, 1, 2, 0, 2], [4, 4, 1, 0, 3]], np.int32)
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], np.int32)
LOSS = np.array([[1, 1, 1, 0, 1], [9, 0.5, 1, 1, 1]], np.float32)

CASES = {
    "plain": ({}, np.ones((2, 4))),
    "segments": ({"segment_ids": SEGMENTS}, [[1, 0, 1, 1], [1, 1, 0, 1]]),
    "loss_weights": ({"loss_weights": LOSS}, LOSS[:, 1:]),
    "both": ({"segment_ids": SEGMENTS, "loss_weights": LOSS}, [[1, 0, 0, 1], [0.5, 1, 0, 1]]),
    "nothing counts": ({"loss_weights": np.zeros((2, 5), np.float32)}, np.zeros((2, 4))),
}


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_prepare_and_loss_by_hand(name, z_loss):
    extra, want = CASES[name]
    want = np.asarray(want, np.float64)
    objective = CausalLM(z_loss=z_loss)
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)

    @jax.jit
    def run(batch):
        prepared = objective.prepare(batch, jax.random.key(0))
        scores = objective.score(Output(last_hidden_state=h, head=Head(w, None, 5)), prepared.targets)
        return prepared, scores, total_loss(objective, scores, prepared.weights)

    prepared, scores, loss = jax.device_get(run({"input_ids": IDS, **extra}))
    np.testing.assert_array_equal(prepared.inputs["input_ids"], IDS[:, :-1])
    np.testing.assert_array_equal(prepared.targets[0], IDS[:, 1:])
    np.testing.assert_allclose(prepared.targets[1], want)
    if "segment_ids" in extra:
        np.testing.assert_array_equal(prepared.inputs["segment_ids"], SEGMENTS[:, :-1])
    terms = {"next_token", "accuracy"} | ({"z_loss"} if z_loss else set())
    read = prepared.weights.pop("tokens")  # all that the model reads, whatever is predicted; segment 0 is padding
    assert read == ((SEGMENTS[:, :-1] > 0).sum() if "segment_ids" in extra else 8)
    assert set(scores) == set(prepared.weights) == terms
    assert all(total == pytest.approx(want.sum()) for total in prepared.weights.values())

    logits = np.float64(h) @ w
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, IDS[:, 1:, None], -1)[..., 0]
    assert scores["next_token"] == pytest.approx((nll * want).sum(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(((logits.argmax(-1) == IDS[:, 1:]) * want).sum())
    mean = ((nll + z_loss * lse**2) * want).sum() / max(want.sum(), 1)
    assert loss == pytest.approx(mean, rel=1e-5)


def test_chunks_are_chosen_only_where_left_open():
    assert [CausalLM().for_run(n, GPTConfig(), None).chunks for n in (1, 8)] == [4, 1]
    assert [CausalLM(chunks=2).for_run(n, GPTConfig(), None).chunks for n in (1, 8)] == [2, 2]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must lie in"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must lie in"),
        ({"z_loss": -1.0}, "z_loss=-1.0 and chunks=0 must not be negative"),
        ({"chunks": -1}, "chunks=-1 must not be negative"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        CausalLM(**fields)


def test_a_head_with_labels_predicts_no_tokens():
    with pytest.raises(ValueError, match="objective CausalLM needs model.head='lm', not 'tokens'"):
        CausalLM().for_run(1, GPTConfig(head="tokens"), None)
