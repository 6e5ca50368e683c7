"""Heads and what a large vocabulary may cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import weights
from llm_jax.nn.output import MASKED, Head, OutputLayer, choice_loss, logistic_loss, sampled_softmax

RNG = np.random.default_rng(0)
T, D, V = 4, 3, 7
H, W, BIAS = (RNG.normal(size=s).astype(np.float32) for s in ((T, D), (D, V), (V,)))
LABELS = np.array([0, 6, 3, 3])


def test_an_output_layer_declares_and_returns_its_head():
    layer = OutputLayer(5, 4, use_bias=True)
    params, axes = weights.split_axes(jax.eval_shape(lambda: layer.init(jax.random.key(0), H)["params"]))
    assert {k: v.shape for k, v in params.items()} == {"kernel": (D, 8), "bias": (8,)}
    assert axes["kernel"] == weights.Axes("embed", "vocab")
    kernel = RNG.normal(size=(D, 8)).astype(np.float32)
    head = layer.apply({"params": {"kernel": kernel, "bias": np.ones(8, np.float32)}}, H)
    assert (head.vocab_size, head.padded_size) == (5, 8)
    logits = head.logits(jnp.asarray(H))
    np.testing.assert_allclose(logits[:, :5], H @ kernel[:, :5] + 1, rtol=1e-5, atol=1e-5)
    assert (np.exp(logits[:, 5:]) == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_sampling_the_whole_vocabulary_is_the_full_softmax(transposed, use_bias):
    @jax.jit
    def both(h, w, bias):
        def loss(fn):
            def inner(h, w, bias):
                head = Head(w.T if transposed else w, bias if use_bias else None, V, transposed)
                return jnp.sum(fn(h, head) * jnp.arange(1.0, T + 1))

            return jax.value_and_grad(inner, (0, 1, 2))(h, w, bias)

        every, zeros = jnp.arange(V), jnp.zeros(V)
        ids = jnp.array([5, 0, 3])
        some = Head(w.T if transposed else w, bias if use_bias else None, V, transposed).some_logits(h, ids)
        sampled = loss(lambda h, head: sampled_softmax(h, head, LABELS, every, zeros))
        full = lambda h, head: -jax.nn.log_softmax(head.logits(h))[jnp.arange(T), LABELS]
        return loss(full), sampled, some

    full, sampled, some = both(H, W, BIAS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), full, sampled)
    logits = H @ W + (BIAS if use_bias else 0)
    np.testing.assert_allclose(some, logits[:, [5, 0, 3]], rtol=1e-5, atol=1e-5)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(full[0], -np.sum(np.arange(1, T + 1) * logp[np.arange(T), LABELS]), rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_output_embeddings_sum_in_float32(transposed):
    w = jnp.ones((V, D) if transposed else (D, V), jnp.bfloat16)
    labels = jnp.full(5000, 3)
    grad = jax.jit(jax.grad(lambda w: Head(w, None, V, transposed).rows(labels).astype(jnp.float32).sum()))(w)
    grad = grad if transposed else grad.T
    np.testing.assert_array_equal(np.float32(grad)[:, 0], [0, 0, 0, np.float32(jnp.bfloat16(5000)), 0, 0, 0])


def test_the_log_q_correction_makes_the_true_distribution_stationary():
    """Over all 2^V samples, each entry in with its own probability q, log p minimises the expected loss."""
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.9, 0.2, 0.5, 0.7])
    samples, chances, labels = [], [], []
    for label, inside in itertools.product(range(4), itertools.product([True, False], repeat=4)):
        samples.append([s if inside[s] else label for s in range(4)])  # a position's own label is left out
        chances.append(p[label] * np.prod(np.where(inside, q, 1 - q)))
        labels.append(label)
    assert sum(chances) == pytest.approx(1)

    @jax.jit
    def gradients(logits):
        def expected(logits, log_q):
            head = Head(jnp.zeros((1, 4)), logits, 4)
            one = lambda label, s: sampled_softmax(jnp.zeros((1, 1)), head, label[None], s, log_q)[0]
            losses = jax.vmap(one)(jnp.array(labels), jnp.array(samples))
            return jnp.sum(losses * jnp.array(chances, jnp.float32))

        both = (jnp.log(jnp.array(q, jnp.float32)), jnp.zeros(4))
        return [jax.grad(expected)(logits, log_q) for log_q in both]

    corrected, plain = gradients(np.log(p).astype(np.float32))
    np.testing.assert_allclose(corrected, 0, atol=1e-6)
    assert np.abs(plain).max() > 1e-2  # without the correction it is biased


def test_losses_of_scores_and_their_slopes():
    """A yes or a no by its logarithm; a choice that has no rival, or only very low ones, is certain."""
    scores = np.array([-80.0, -3.0, 0.0, 0.5, 80.0], np.float32)
    losses, slopes = jax.jit(jax.vmap(jax.value_and_grad(logistic_loss)))(scores)
    wide = scores.astype(np.float64)
    np.testing.assert_allclose(losses, np.logaddexp(0, -wide), rtol=1e-6)
    np.testing.assert_allclose(slopes, -1 / (1 + np.exp(wide)), rtol=1e-6)
    chosen, others = jnp.array([0.3, 0.3, 0.3]), jnp.array([1.2, -jnp.inf, MASKED])
    np.testing.assert_allclose(choice_loss(chosen, others), [np.logaddexp(0, 0.9), 0, 0], rtol=1e-6)
    for change in jax.jit(jax.grad(lambda a, b: choice_loss(a, b).sum(), (0, 1)))(chosen, others):
        np.testing.assert_allclose(np.abs(change), [1 / (1 + np.exp(-0.9)), 0, 0], rtol=1e-6)
