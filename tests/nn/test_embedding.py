import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn import weights
from llm_jax.nn.embedding import Embedding
from llm_jax.nn.output import padded_size

RNG = np.random.default_rng(0)
TABLE, H = RNG.normal(size=(8, 4)).astype(np.float32), RNG.normal(size=(2, 3, 4)).astype(np.float32)
IDS = np.array([[0, 4], [2, 2]])


def test_padding():
    assert [padded_size(n, 8) for n in (1, 7, 8, 9)] == [8, 8, 8, 16] and padded_size(5, 1) == 5
    shapes = jax.eval_shape(lambda: Embedding(5, 4, 8).init(jax.random.key(0), IDS))["params"]
    params, axes = weights.split_axes(shapes)
    assert params["embedding"].shape == (8, 4) and axes["embedding"] == weights.Axes("vocab", "embed")


def test_rows_times_the_root_of_the_width():
    @jax.jit
    def run(table):
        look = lambda scale, dtype: Embedding(5, 4, 8, scale).apply({"params": {"embedding": table}}, IDS, dtype)
        return {(scale, dtype): look(scale, dtype) for scale in (False, True) for dtype in ("float32", "bfloat16")}

    for (scale, dtype), rows in jax.device_get(run(TABLE)).items():
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, (2 if scale else 1) * TABLE[IDS].astype(rows.dtype))


def test_tied_head_and_padded_rows():
    layer = Embedding(5, 4, 8)

    @jax.jit
    def run(table):
        def logp(table):
            head = layer.apply({"params": {"embedding": table}}, method="head")
            logits = head.logits(jnp.asarray(H))
            return jax.nn.log_softmax(logits)[..., :5].sum(), logits

        (_, logits), grad = jax.value_and_grad(logp, has_aux=True)(table)
        return logits, jax.nn.softmax(logits), grad

    logits, p, grad = jax.device_get(run(TABLE))
    np.testing.assert_allclose(logits[..., :5], H @ TABLE[:5].T, rtol=1e-5, atol=1e-6)
    assert (p[..., 5:] == 0).all() and (grad[5:] == 0).all()  # exactly
    np.testing.assert_allclose(p[..., :5].sum(-1), 1, rtol=1e-6)
    assert (np.abs(grad[:5]).max(-1) > 1e-3).all()
