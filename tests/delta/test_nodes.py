"""Nodes of deltas: every product is that of their matrix, alone and nested, and gradients are those of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress.quantize import quantize_array
from llm_jax.delta import dora, node, rows
from llm_jax.delta.lora import Lora
from llm_jax.delta.node import DeltaError
from llm_jax.delta.rows import TokenRows
from llm_jax.delta.scaled import Biased, Scaled
from llm_jax.nn import weights
from llm_jax.nn.weights import Axes

RNG = np.random.default_rng(0)
IN, OUT, R = 6, 5, 2
W, A, B = RNG.normal(size=(IN, OUT)), RNG.normal(size=(IN, R)), RNG.normal(size=(R, OUT))
L_OUT, L_IN, SHIFT, BIAS = (RNG.normal(size=n) for n in (OUT, IN, OUT, OUT))
X, IDS = RNG.normal(size=(3, 4, IN)), np.array([[0, 3], [5, 5]])
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def magnitudes(matrix):
    return np.linalg.norm(matrix, axis=0)


def with_length(matrix, m):
    return matrix * m / magnitudes(matrix)


LORA = lambda base=W: Lora(jnp.asarray(base) if isinstance(base, np.ndarray) else base, A, B, 0.3)
NODES = {  # name: (node, its matrix, what it makes of the bias)
    "scaled": (lambda: Scaled(jnp.asarray(W), L_OUT), W * L_OUT, BIAS * L_OUT),
    "scaled inputs": (lambda: Scaled(jnp.asarray(W), L_IN, True), L_IN[:, None] * W, BIAS),
    "biased": (lambda: Biased(jnp.asarray(W), SHIFT), W, BIAS + SHIFT),
    "scaled around lora": (lambda: Scaled(LORA(), L_OUT), (W + 0.3 * A @ B) * L_OUT, BIAS * L_OUT),
    "lora around scaled": (lambda: LORA(Scaled(jnp.asarray(W), L_OUT)), W * L_OUT + 0.3 * A @ B, BIAS * L_OUT),
    "biased around scaled": (lambda: Biased(Scaled(jnp.asarray(W), L_OUT), SHIFT), W * L_OUT, BIAS * L_OUT + SHIFT),
    "dora": (
        lambda: dora.around(LORA()).replace(magnitude=jnp.asarray(np.abs(L_OUT))),
        with_length(W + 0.3 * A @ B, np.abs(L_OUT)),
        BIAS,
    ),
    "rows": (
        lambda: TokenRows(jnp.asarray(W), jnp.asarray(2 * W[:2]), (1, 3)),
        np.stack([W[0], 2 * W[0], W[2], 2 * W[1], W[4], W[5]]),
        BIAS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_products_are_those_of_the_matrix(name):
    make, matrix, bias = NODES[name]
    with jax.enable_x64(True):
        w, b = make(), jnp.asarray(BIAS)
        close(weights.dense(w), matrix)
        close(weights.matmul(X, w), X @ matrix)
        close(weights.matmul_t(X[..., :OUT], w), X[..., :OUT] @ matrix.T)
        close(weights.take(w, IDS), matrix[IDS])
        close(weights.linear(X, w, b), X @ matrix + bias)
        merged, merged_bias = node.folded(w, b)
        close(merged, matrix)
        close(merged_bias, bias)
        assert weights.shape_of(w) == (IN, OUT)
        if name not in ("dora", "rows"):
            base, base_bias = node.unfolded(w, merged, merged_bias)
            close(node.stripped(base), W)
            close(base_bias, BIAS)
        axes = weights.axes_of(w, Axes("embed", "mlp"))
        is_axes = lambda x: isinstance(x, Axes)
        assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(w)
        assert jax.tree.map(len, axes, is_leaf=is_axes) == jax.tree.map(jnp.ndim, w)


def test_stacked_nodes_fold_as_their_layers_do():
    with jax.enable_x64(True):
        for name, (make, matrix, bias) in NODES.items():
            if name == "rows":
                continue
            stacked = jax.tree.map(lambda x: jnp.stack([x, x]), make())
            merged, merged_bias = node.folded(stacked, jnp.stack([jnp.asarray(BIAS)] * 2))
            for i in range(2):
                close(merged[i], matrix)
                close(merged_bias[i], bias)


def test_dora_passes_no_gradient_through_the_norm():
    """The gradient is that of `(x @ (W + s A B)) * m / c` with c constant (equation 11 of the paper)."""
    with jax.enable_x64(True):
        w = dora.around(LORA()).replace(magnitude=jnp.asarray(np.abs(L_OUT)))
        c = magnitudes(W + 0.3 * A @ B)

        def ours(a, b, m):
            return jnp.sum(jnp.sin(weights.matmul(X, w.replace(base=w.base.replace(a=a, b=b), magnitude=m))))

        def by_hand(a, b, m):
            y = X @ W + 0.3 * X @ a @ b
            return jnp.sum(jnp.sin(y * jnp.broadcast_to(m / c, y.shape)))

        given = (jnp.asarray(A), jnp.asarray(B), jnp.asarray(np.abs(L_OUT)))
        for got, want in zip(jax.grad(ours, (0, 1, 2))(*given), jax.grad(by_hand, (0, 1, 2))(*given), strict=True):
            close(got, want)


def test_dora_never_builds_the_merged_matrix():
    """No value of the kernel's shape is made in a step that trains a DoRA: forward and backward."""
    w = dora.around(Lora(jnp.zeros((40, 30)) + 1, jnp.ones((40, 2)), jnp.ones((2, 30)), 1.0))

    def loss(trained):
        return weights.matmul(
            jnp.ones((3, 40)), w.replace(base=w.base.replace(**trained[0]), magnitude=trained[1])
        ).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(({"a": w.base.a, "b": w.base.b}, w.magnitude))
    made = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert (40, 30) not in made and (30, 40) not in made and (3, 30) in made


def test_dora_over_int8_and_what_it_cannot_stand_on():
    eight = quantize_array(jnp.asarray(W, jnp.float32))
    w = dora.around(Lora(eight, jnp.asarray(A, jnp.float32), jnp.zeros((R, OUT)), 0.3))
    np.testing.assert_allclose(
        weights.matmul(jnp.asarray(X, jnp.float32), w), X @ np.asarray(eight.dense()), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(DeltaError, match="DoRA needs a plain or quantized matrix below its LoRA, not IA3"):
        dora.around(LORA(Scaled(jnp.asarray(W), L_OUT)))
    with pytest.raises(DeltaError, match="DoRA cannot be taken out"):
        node.unfolded(w, jnp.asarray(W), None)


def test_rows_of_a_table():
    table = jnp.asarray(W)
    w = rows.attach(table, (3, 1))
    assert w.ids == (1, 3) and np.array_equal(w.rows, table[jnp.array([1, 3])])
    grads = jax.grad(lambda r: weights.take(w.replace(rows=r), np.array([3, 3, 0])).sum())(w.rows)
    np.testing.assert_array_equal(grads, [[0] * OUT, [2] * OUT])
    for ids in ((), (1, 1), (-1,), (6,)):
        with pytest.raises(DeltaError, match="different numbers from 0 to 5"):
            rows.attach(table, ids)
