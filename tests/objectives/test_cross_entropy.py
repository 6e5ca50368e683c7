"""Loss and hand-written gradient against a plain log-softmax, in both precisions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.output import Head
from llm_jax.objectives.cross_entropy import cross_entropy_sums, token_losses

B, T, D, V = 2, 5, 4, 7
RNG = np.random.default_rng(0)
H, W, BIAS = RNG.normal(size=(B, T, D)), RNG.normal(size=(D, V + 3)), RNG.normal(size=V + 3)
LABELS = RNG.integers(0, V, (B, T))
WEIGHTS = np.array([[1, 1, 0, 2, 0.5], [0, 0, 0, 1, 1]])
PRECISIONS = pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-10)])


@PRECISIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_equal_autodiff(smoothing, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        logits = np.concatenate([RNG.normal(size=(T, V)) * 3, np.full((T, 2), -1e30)], axis=1).astype(dtype)
        g = RNG.normal(size=(2, T)).astype(dtype)

        def plain(logits):
            real = logits[:, :V]
            logp = jax.nn.log_softmax(real)
            target = (1 - smoothing) * jax.nn.one_hot(LABELS[0], V, dtype=dtype) + smoothing / V
            return -jnp.sum(target * logp, -1), jax.nn.logsumexp(real, -1)

        @jax.jit
        def run(logits):
            ours = lambda x: token_losses(x, jnp.asarray(LABELS[0]), V, smoothing)
            both = lambda f: (lambda out, back: (out, back((g[0], g[1]))))(*jax.vjp(f, logits))
            return both(ours), both(plain)

        ours, theirs = jax.device_get(run(logits))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=bound), ours, theirs)
        assert ours[1][0].dtype == dtype and (ours[1][0][:, V:] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits_are_computed_with_in_float32(dtype):
    h, w = jnp.asarray(H, dtype), jnp.asarray(W, dtype)

    @jax.jit
    def run(h, w):
        def one(wide):
            logits = Head(w, None, V).logits(h, wide=wide)
            losses = lambda x: token_losses(x, jnp.asarray(LABELS), V, 0.1)
            out, back = jax.vjp(losses, logits)
            return logits, out, back(jax.tree.map(jnp.ones_like, out))

        return one(False), one(True)

    (logits, out, grad), (wide_logits, wide_out, wide_grad) = jax.device_get(run(h, w))
    assert logits.dtype == grad[0].dtype == dtype and wide_logits.dtype == out[0].dtype == out[1].dtype == "float32"
    assert np.isfinite(np.float32(logits)).all() and (grad[0][..., V:] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, wide_out)
    np.testing.assert_allclose(np.float32(grad[0]), wide_grad[0], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "padded, transposed, smoothing, dtype, bound",
    [(0, False, 0.1, "float32", 1e-5), (3, True, 0.0, "float32", 1e-5), (3, False, 0.2, "float64", 1e-10)],
)
def test_sums(padded, transposed, smoothing, dtype, bound):
    """Chunks that divide or not equal the whole, and both the formulas; gradients too."""
    with jax.enable_x64(dtype == "float64"):
        h, w, bias = H.astype(dtype), W[:, : V + padded].astype(dtype), BIAS[: V + padded].astype(dtype)

        @jax.jit
        def run(h, w, bias):
            def ours(h, w, bias, chunks, z=0.1):
                head = Head(w.T if transposed else w, bias, V, transposed)
                labels, mask = jnp.asarray(LABELS), jnp.asarray(WEIGHTS)
                out = cross_entropy_sums(h, head, labels, mask, smoothing, chunks, z_loss=z > 0)
                return 3 * out[0] + z * out[1], out

            def plain(h, w, bias, z=0.1):
                logits = (h @ w + bias.reshape(1, 1, -1))[..., :V]
                lse = jax.nn.logsumexp(logits, -1)
                logp = logits - lse[..., None]
                own = jnp.take_along_axis(logp, jnp.asarray(LABELS)[..., None], -1)[..., 0]
                loss = -(1 - smoothing) * own - smoothing * logp.mean(-1)
                correct = jnp.argmax(logits, -1) == jnp.asarray(LABELS)
                out = tuple(jnp.sum(x * jnp.asarray(WEIGHTS, dtype)) for x in (loss, lse**2, correct))
                return 3 * out[0] + z * out[1], out

            grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
            return [
                (grad(plain)(h, w, bias, z), [grad(ours)(h, w, bias, chunks, z) for chunks in (1, 2, 5, 64)])
                for z in (0.1, 0.0)
            ]

        for want, got in jax.device_get(run(h, w, bias)):
            for one in got:
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=bound), one, want)


def test_float16_gradients_in_chunks_fit_where_those_of_the_mean_do():
    """20 of every position's 0.5 summed over 16,384 positions exceed 65,504; their mean does not."""
    h, w = jnp.full((16, 1024, 2), 20, jnp.float16), jnp.zeros((2, 2), jnp.float16)
    labels, ones = jnp.zeros(h.shape[:2], jnp.int32), jnp.ones(h.shape[:2])
    loss = lambda w: cross_entropy_sums(h, Head(w, None, 2), labels, ones, chunks=4, z_loss=False)[0] / labels.size
    grad = jax.jit(jax.grad(lambda w: 1024 * loss(w)))(w)
    np.testing.assert_allclose(np.float32(grad), 1024 * 20 * np.array([[-0.5, 0.5]] * 2), rtol=1e-2)


@pytest.mark.parametrize("argument, products", [((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_chunks_compute_nothing_twice_and_nothing_for_what_is_frozen(argument, products):
    def loss(h, w):
        labels = jnp.zeros(h.shape[:2], jnp.int32)
        return cross_entropy_sums(h, Head(w, None, 50), labels, jnp.ones(h.shape[:2]), chunks=4, z_loss=False)[0]

    shapes = jax.ShapeDtypeStruct((2, 80, 8), "f4"), jax.ShapeDtypeStruct((8, 50), "f4")
    text = jax.jit(jax.grad(loss, argument)).lower(*shapes).compile().as_text()
    assert len(re.findall(r" dot\(", text)) == products


@pytest.mark.parametrize("z_loss", [True, False])
def test_chunks_never_hold_all_logits(z_loss):
    t, d, v = 2048, 8, 512

    def temporary(chunks):
        def loss(h, w, labels):
            ones = jnp.ones(labels.shape)
            return cross_entropy_sums(h, Head(w, None, v), labels, ones, chunks=chunks, z_loss=z_loss)[0]

        shapes = [jax.ShapeDtypeStruct(s, k) for s, k in (((1, t, d), "f4"), ((d, v), "f4"), ((1, t), "i4"))]
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) < t * v * 4 / 4 < t * v * 4 <= temporary(1)
