"""GloVe: loss and step against closed forms and autodiff, and what it learns on letters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from letters import TEXT

from llm_jax.classic import counts, glove, sentences
from llm_jax.classic.counts import CountsError

PAIRS = glove.Pairs(
    jnp.array([0, 1, 0, 3]), jnp.array([1, 1, 2, 3]), jnp.array([0.3, -1.0, 2.0, 0.5]), jnp.array([1.0, 0.5, 0.2, 0.0])
)


def tables(seed, size=5, width=4):
    return glove.Tables(*jax.random.normal(jax.random.key(seed), (2, size, width)))


def dense_loss(t):
    """Of all pairs of words, most of them with weight 0; the closed form of the paper's equation 8, halved."""
    logs = jnp.zeros((5, 5)).at[PAIRS.words, PAIRS.contexts].set(PAIRS.log_counts)
    weights = jnp.zeros((5, 5)).at[PAIRS.words, PAIRS.contexts].set(PAIRS.weights)
    biases = t.words_VE[:, -1][:, None] + t.contexts_VE[:, -1][None]
    return 0.5 * jnp.sum(weights * (t.words_VE[:, :-1] @ t.contexts_VE[:, :-1].T + biases - logs) ** 2)


def test_loss_and_step_against_autodiff():
    """A step of rate 1 with sums of squares that hide what is added to them is the gradient of the dense loss."""
    before, large = tables(0), 1e8
    squares = jax.tree.map(lambda x: jnp.full_like(x, large), before)
    value, grads = jax.value_and_grad(dense_loss)(before)
    after, _, got = glove.step(before, squares, PAIRS, learning_rate=large**0.5)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for a, b, g in zip(after, before, grads, strict=True):
        np.testing.assert_allclose(b - a, g, atol=1e-5)
        assert np.abs(g).max() > 0.1
        np.testing.assert_array_equal(a[4], b[4])  # rows of no pair stay


def test_a_step_squares_pair_by_pair():
    before = tables(1)
    ones = jax.tree.map(jnp.ones_like, before)
    after, squares, _ = glove.step(before, ones, PAIRS, learning_rate=0.1)
    w, c, slopes = np.array(before.words_VE), np.array(before.contexts_VE), []
    for i, j, log, f in zip(*PAIRS, strict=True):
        slopes.append(f * (w[i, :-1] @ c[j, :-1] + w[i, -1] + c[j, -1] - log))
    one = np.ones(1)
    grads = [slopes[k] * np.append(c[j, :-1], one) for k, j in enumerate(PAIRS.contexts)]
    want = 1 + grads[0] ** 2 + grads[2] ** 2  # word 0 has two pairs
    np.testing.assert_allclose(squares.words_VE[0], want, rtol=1e-5)
    np.testing.assert_allclose(after.words_VE[0], w[0] - 0.1 * (grads[0] + grads[2]) / np.sqrt(want), rtol=1e-5)


def test_learns(tmp_path):
    """Measured: a mean loss of 0.0049 after 200 epochs, from 0.0614."""
    (tmp_path / "text.txt").write_text(TEXT)
    vocabulary, text = sentences.read(sentences.Reader([tmp_path / "text.txt"]))
    found = counts.cooccurrences(text, len(vocabulary), 3, "harmonic")
    train = lambda: glove.train(found, jax.random.key(0), dim=4, epochs=200, x_max=10, batch_size=16)
    vectors, losses = train()
    assert vectors.shape == (len(vocabulary), 4) and np.isfinite(vectors).all()
    assert losses[-1] < 0.1 * losses[0]
    np.testing.assert_array_equal(train()[0], vectors)


@pytest.mark.parametrize(
    "matrix, options, words",
    [
        (np.eye(3), {"learning_rate": float("nan")}, "learning_rate=nan must be a positive number"),
        (np.eye(3), {"dim": 0}, "dim=0 must be a positive number"),
        (np.zeros((3, 3)), {}, r"shape \(3, 3\) with 0 pairs"),
        (np.ones((3, 2)), {}, r"shape \(3, 2\) with 6 pairs: give square ones"),
        (-np.eye(3), {}, "must be positive and finite"),
    ],
)
def test_errors(matrix, options, words):
    with pytest.raises(CountsError, match=words):
        glove.train(scipy.sparse.csr_matrix(matrix), jax.random.key(0), **options)
