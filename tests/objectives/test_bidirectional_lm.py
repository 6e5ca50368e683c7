"""Both directions' losses by hand, the sampled softmax, and states that run on from batch to batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import MODELS, random_params

from llm_jax.data.characters import character_ids
from llm_jax.models.elmo import ElmoConfig
from llm_jax.objectives.bidirectional_lm import BidirectionalLM, log_uniform
from llm_jax.objectives.objective import total_loss
from llm_jax.training.state import init_state
from llm_jax.training.step import StepConfig, make_train_step

CONFIG = ElmoConfig(
    vocab_size=9, max_characters=4, character_dim=3, widths=(1, 2), filters=(3, 4), num_highways=1, model_dim=6,
    hidden_dim=8, dropout=0.0,
)  # fmt: skip
TABLE = np.stack([character_ids(w, 4) for w in "abcdefghi"])
TEXT = np.random.default_rng(0).integers(0, 9, (4, 13))
PARAMS = random_params(CONFIG.make(), np.zeros((1, 2, 4), np.int32))


def batch(start, size=4):
    ids = TEXT[:, start : start + size + 1]
    return {"input_ids": ids, "character_ids": TABLE[ids], "continues": np.full(4, start > 0)}


def test_losses_by_hand():
    objective = BidirectionalLM().for_run(1, CONFIG, None)

    @jax.jit
    def run(params):
        prepared = objective.prepare(batch(0, 12), jax.random.key(0))
        out = CONFIG.make().apply({"params": params}, **prepared.inputs)
        empty = objective.prepare({**batch(0), "loss_weights": np.zeros((4, 5))}, jax.random.key(0))
        return out.last_hidden_state, objective.score(out, prepared.targets), prepared.weights, empty.weights

    h, scores, totals, empty = run(PARAMS)
    logp = lambda h: np.asarray(jax.nn.log_softmax(h @ PARAMS["head"]["kernel"] + PARAMS["head"]["bias"][None, None]))
    pick = lambda logp, ids: np.take_along_axis(logp, ids[..., None], 2).sum()
    np.testing.assert_allclose(scores["forward"], -pick(logp(h[..., :6]), TEXT[:, 1:]), rtol=1e-5)
    np.testing.assert_allclose(scores["backward"], -pick(logp(h[:, 1:, 6:]), TEXT[:, :-2]), rtol=1e-5)
    assert (totals["forward"], totals["backward"], totals["tokens"]) == (48, 44, 48)
    assert empty["forward"] == empty["backward"] == 0


def test_the_proposal_is_a_distribution_that_falls():
    p = np.exp(np.asarray(log_uniform(1000)))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-4)
    assert (np.diff(p) < 0).all()


def test_the_sampled_softmax_comes_near_the_full_one():
    """With the log-q correction the mean of many draws is near the full loss, and from below."""
    full, sampled = (BidirectionalLM(samples=n).for_run(1, CONFIG, None) for n in (0, 9))

    @jax.jit
    def run(params, key):
        def one(objective, key):
            prepared = objective.prepare(batch(0, 12), key)
            out = CONFIG.make().apply({"params": params}, **prepared.inputs)
            return total_loss(objective, objective.score(out, prepared.targets), prepared.weights)

        return one(full, key), jnp.mean(jax.vmap(lambda k: one(sampled, k))(jax.random.split(key, 64)))

    want, got = run(PARAMS, jax.random.key(0))
    assert 0.75 * want < got < want + 0.02


@pytest.mark.parametrize("accumulation", [1, 2])
def test_states_run_on_and_are_reset(accumulation):
    """After three batches the carry is what one pass over all their words leaves; a new epoch begins from zeros."""
    objective = BidirectionalLM(carry=True).for_run(1, CONFIG, None)
    tx = optax.sgd(0.0)
    step = jax.jit(make_train_step(CONFIG.make(), objective, tx, StepConfig(accumulation=accumulation)))
    state = init_state(PARAMS, tx, jax.random.key(0), carry=CONFIG.init_carry(4))
    for start in (0, 4, 8):
        state, metrics = step(state, batch(start))
    run = jax.jit(lambda p, ids, c: CONFIG.make().apply({"params": p}, ids, cache=c).cache)
    want = run(PARAMS, TABLE[TEXT[:, :12]], None)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.carry.forward, want.forward)
    stepwise = None  # the backward states too, batch by batch, as the original carries them
    for start in (0, 4, 8):
        stepwise = run(PARAMS, TABLE[TEXT[:, start : start + 4]], stepwise)
    jax.tree.map(close, state.carry.backward, stepwise.backward)
    state, metrics = step(state, batch(0))
    jax.tree.map(close, state.carry, run(PARAMS, TABLE[TEXT[:, :4]], None))
    assert metrics["tokens"] == 16


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BidirectionalLM(samples=-1), "samples=-1 must not be negative"),
        (lambda: BidirectionalLM().for_run(1, MODELS["gpt2"], None), "needs an ElmoConfig with vocab_size"),
        (
            lambda: BidirectionalLM().for_run(1, dataclasses.replace(CONFIG, vocab_size=0), None),
            "needs an ElmoConfig with vocab_size",
        ),
        (lambda: BidirectionalLM(samples=10).for_run(1, CONFIG, None), "samples=10 exceed the vocabulary of 9"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
