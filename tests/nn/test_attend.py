"""Three implementations against loops and hand-written gradients in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from llm_jax.nn.attend import Mask, attend, attention_weights
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.positions import alibi_slopes

B, T, S, H = 2, 7, 9, 4
RNG = np.random.default_rng(0)
Q_AT = np.stack([np.arange(2, 9), np.arange(2, 9)]).astype(np.int32)
K_AT = np.stack([np.arange(9), np.arange(9)]).astype(np.int32)
PADDED = np.where(K_AT[:] >= np.array([[0], [5]]), K_AT, -1).astype(np.int32)  # rows 2-4 of the second see nothing
Q_DOC = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2, 0]], np.int32)
K_DOC = np.concatenate([np.ones((2, 2), np.int32), Q_DOC], axis=1)
BIAS = RNG.normal(size=(1, 4, T, S)).astype(np.float32)

# name: (query heads, key heads, mask, with slopes, bias)
CASES = {
    "everywhere": (4, 4, None, False, None),
    "causal, 3 of 9": (9, 3, Mask(Q_AT, K_AT), False, None),
    "padding and hidden rows": (4, 2, Mask(Q_AT, PADDED), False, None),
    "packed, alibi": (4, 1, Mask(Q_AT, K_AT, Q_DOC, K_DOC), True, None),
    "window": (4, 2, Mask(Q_AT, K_AT, window=3), False, None),
    "window both ways, bias": (4, 4, Mask(Q_AT, K_AT, causal=False, window=2), False, BIAS),
    "everything": (4, 2, Mask(Q_AT, PADDED, Q_DOC, K_DOC, window=5), True, BIAS),
}
SCALE = 1 / math.sqrt(H)


@pytest.mark.parametrize("t, heads", [(3, 4), (1, 1), (2, 2)])
def test_few_queries_with_many_keys(t, heads):
    """To one head of keys, from several queries or from a group of heads: other products on a CPU, the same values."""
    q, k, v, dout = (RNG.normal(size=(2, *s, H)).astype(np.float32) for s in ((t, 4), (50, heads), (50, heads), (t, 4)))
    at = np.arange(50 - t, 50, dtype=np.int32), np.arange(50, dtype=np.int32)
    allowed = RNG.uniform(size=(2, t, 50)) > 0.3
    allowed[1, 0] = False  # this query sees nothing
    mask = Mask(*(np.broadcast_to(x, (2, len(x))) for x in at), allowed_BTS=allowed)
    bias = RNG.normal(size=(2, 4, t, 50)).astype(np.float32)

    def run(kind, *operands):
        out, back = jax.vjp(
            lambda q, k, v, bias: attend(
                q, k, v, mask, scale=SCALE, implementation=kind, bias_BNTS=bias, slopes_N=alibi_slopes(4)
            ),
            *operands,
        )
        return out, back(dout)

    got, want = (jax.jit(run, static_argnums=0)(kind, q, k, v, bias) for kind in ("fused", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert (got[0][1, 0] == 0).all()


def may_look(mask, b, t, s):
    if mask is None:
        return True
    q, k = mask.q_positions_BT[b, t], mask.k_positions_BS[b, s]
    return (
        k >= 0
        and (not mask.causal or k <= q)
        and (mask.window is None or q - k < mask.window)
        and (mask.q_segments_BT is None or mask.q_segments_BT[b, t] == mask.k_segments_BS[b, s])
    )


def loops(q, k, v, mask, slopes, bias, dout):
    """(output, weights, gradients of q, k, v, bias), one query at a time."""
    n, share = q.shape[2], q.shape[2] // k.shape[2]
    out, w = np.zeros(q.shape), np.zeros((B, n, T, S))
    dq, dk, dv, dbias = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros((1, n, T, S))
    for b in range(B):
        for head in range(n):
            for t in range(T):
                seen = [s for s in range(S) if may_look(mask, b, t, s)]
                if not seen:
                    continue
                keys, values = k[b, seen, head // share], v[b, seen, head // share]
                scores = keys @ q[b, t, head] * SCALE
                if slopes is not None:
                    scores = scores - slopes[head] * (mask.q_positions_BT[b, t] - mask.k_positions_BS[b, seen])
                if bias is not None:
                    scores = scores + bias[0, head, t, seen]
                p = np.exp(scores - scores.max())
                p /= p.sum()
                w[b, head, t, seen] = p
                out[b, t, head] = p @ values
                dp = values @ dout[b, t, head]
                ds = p * (dp - p @ dp)
                dq[b, t, head] = ds @ keys * SCALE
                for i, s in enumerate(seen):
                    dk[b, s, head // share] += ds[i] * q[b, t, head] * SCALE
                    dv[b, s, head // share] += p[i] * dout[b, t, head]
                    dbias[0, head, t, s] += ds[i]
    return out, w, (dq, dk, dv, *(() if bias is None else (dbias,)))


def arrays(n, k, dtype):
    rng = np.random.default_rng(1)
    return [rng.normal(size=s).astype(dtype) for s in ((B, T, n, H), (B, S, k, H), (B, S, k, H), (B, T, n, H))]


def check(name, implementations, dtype, bound):
    n, heads, mask, with_slopes, bias = CASES[name]
    q, k, v, dout = arrays(n, heads, dtype)
    slopes = alibi_slopes(n).astype(dtype) if with_slopes else None
    operands = (q, k, v) if bias is None else (q, k, v, bias.astype(dtype))

    @jax.jit
    def run(operands, mask, dout):
        def one(implementation):
            def f(q, k, v, bias=None):
                options = dict(slopes_N=slopes, bias_BNTS=bias, q_chunk=3, k_chunk=4, scale=SCALE)
                return attend(q, k, v, mask, implementation=implementation, **options)

            out, back = jax.vjp(f, *operands)
            return out, back(dout)

        q, k, *_, last = operands
        shown = attention_weights(q, k, mask, scale=SCALE, slopes_N=slopes, bias_BNTS=None if bias is None else last)
        return [one(i) for i in implementations], shown

    wide = [np.float64(x) for x in (q, k, v)]
    out, w, grads = loops(*wide, mask, slopes, bias, np.float64(dout))
    results, shown = run(operands, mask, dout)
    np.testing.assert_allclose(shown, w, rtol=bound, atol=bound)
    for implementation, (got, got_grads) in zip(implementations, results, strict=True):
        assert got.dtype == dtype
        tell = dict(rtol=bound, atol=bound, err_msg=implementation)
        np.testing.assert_allclose(got, out, **tell)
        for a, b in zip(got_grads, grads, strict=True):
            np.testing.assert_allclose(a, b, **tell)
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_implementation_equals_loops(name):
    out = check(name, ("reference", "fused", "chunked"), "float32", 1e-5)
    hidden = (np.abs(out).max((-1, -2)) == 0).sum()
    assert hidden == {"padding and hidden rows": 3, "everything": 3}.get(name, 0)  # rows of zeros were compared


def test_float64_is_never_narrowed():
    with jax.enable_x64(True):
        check("everything", ("chunked", "auto"), "float64", 1e-10)


@pytest.mark.parametrize("window", [None, 3])
def test_an_ordered_mask_gives_what_its_array_gives(window):
    q, k, v, dout = (x[:, :T] for x in arrays(4, 2, "float32"))
    mask = Mask(Q_AT - 2, Q_AT - 2, window=window)

    @jax.jit
    def run(q, k, v, dout):
        def one(ordered):
            out, back = jax.vjp(lambda *x: attend(*x, mask.replace(ordered=ordered), scale=SCALE), q, k, v)
            return out, back(dout)

        return one(True), one(False)

    a, b = run(q, k, v, dout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def test_an_ordered_mask_is_not_read(monkeypatch):
    q, k, v, _ = (x[:, :5] for x in arrays(4, 2, "float32"))  # a length of its own: checkpoint remembers its traces
    at = Q_AT[:, :5] - 2
    mask = Mask(at, at, ordered=True)
    monkeypatch.setattr(Mask, "dense", lambda self: pytest.fail("the mask was made an array"))
    for changes in ({}, dict(causal=False)):
        jax.eval_shape(lambda *x, c=changes: attend(*x, mask.replace(**c), scale=SCALE), q, k, v)
    for changes in (dict(causal=False, window=2), dict(ordered=False)):
        with pytest.raises(pytest.fail.Exception):
            jax.eval_shape(lambda *x, c=changes: attend(*x, mask.replace(**c), scale=SCALE), q, k, v)
    assert mask.ordered and not mask.slice("q", 0, 2).ordered and not mask.slice("k", 0, 2).ordered


@pytest.mark.parametrize(
    "length, width, dtype, runs",
    [(8, 16, "bfloat16", True), (8, 128, "float16", True), (8, 16, "float32", False), (7, 16, "bfloat16", False)]
    + [(8, 12, "bfloat16", False), (8, 136, "bfloat16", False)],
)
def test_where_the_kernel_of_cudnn_runs(length, width, dtype, runs, monkeypatch):
    """Read off the program lowered for CUDA, which needs no GPU."""
    versions = type("Versions", (), {"cudnn_get_version": staticmethod(lambda: 91000)})
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", versions)
    monkeypatch.setattr("llm_jax.nn.attend._cudnn_runs", lambda: True)
    at = jnp.broadcast_to(jnp.arange(length), (2, length))
    x = jax.ShapeDtypeStruct((2, length, 4, width), dtype)

    def text(ordered):
        f = jax.jit(lambda q, k, v: attend(q, k, v, Mask(at, at, ordered=ordered), scale=SCALE))
        return f.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()

    assert ("cudnn" in text(True), "cudnn" in text(False)) == (runs, False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_keeps_no_scores(dtype, capsys):
    """For the backward pass of a plain mask and of a dense one with a bias: nothing as large as [T, S]."""
    q, k, v, _ = arrays(4, 4, dtype)
    some = BIAS if dtype == "float32" else None  # which the choice between float16's two forms hands on
    for mask, bias in ((None, None), (Mask(Q_AT, K_AT), some)):
        loss = lambda *x, m=mask, b=bias: attend(*x, m, scale=SCALE, bias_BNTS=b, implementation="fused").sum()
        print_saved_residuals(loss, q, k, v)
        assert f"{T},{S}]" not in capsys.readouterr().out.replace(f"f32[1,4,{T},{S}] from a constant", "")


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_dropout(implementation):
    """With the identity for values the output is the dropped weights: each 0 or w / (1 - rate)."""
    rng, rate, size = np.random.default_rng(0), 0.3, 8
    q, k = (rng.normal(size=(1, size, 2, size)).astype(np.float32) for _ in range(2))
    eye = np.broadcast_to(np.eye(size, dtype=np.float32)[None, :, None], (1, size, 2, size))
    at = np.arange(size, dtype=np.int32)[None]
    options = dict(scale=0.2, implementation=implementation, q_chunk=4, k_chunk=4)

    @jax.jit
    def run(q, k, keys, dout):
        drop = lambda v, key: attend(q, k, v, Mask(at, at), dropout_rate=rate, dropout_key=key, **options)
        out, back = jax.vjp(lambda v: drop(v, keys[0]), eye)
        many = jax.vmap(lambda key: drop(eye, key))(keys)
        return attend(q, k, eye, Mask(at, at), **options), many, out, back(dout)[0]

    dout = rng.normal(size=q.shape).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2000)
    w, many, out, dv = jax.device_get(run(q, k, keys, dout))
    np.testing.assert_array_equal(out, many[0])  # the same key, the same mask
    np.testing.assert_allclose(dv, np.einsum("btns,btnh->bsnh", out, dout), rtol=1e-5, atol=1e-5)  # backward too
    kept = many > 0
    np.testing.assert_allclose(many, np.where(kept, w / (1 - rate), 0), rtol=1e-5, atol=1e-6)
    seen = w > 0
    rates = kept.mean(0)[seen]
    deviation = math.sqrt(rate * (1 - rate) / len(keys))
    assert np.abs(rates - (1 - rate)).max() < 5 * deviation
    together = (kept[:, seen][:, :, None] & kept[:, seen][:, None, :]).mean(0)  # independent of one another
    off = ~np.eye(seen.sum(), dtype=bool)
    assert np.abs(together[off] - (1 - rate) ** 2).max() < 6 * deviation


def test_memory_of_chunks_is_linear_in_the_length():
    def temporary(implementation, length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        at = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def grads(q, k, v, at):
            loss = lambda q, k, v: attend(
                q, k, v, Mask(at, at), scale=1.0, implementation=implementation, q_chunk=64, k_chunk=64
            ).sum()
            return jax.grad(loss, (0, 1, 2))(q, k, v)

        return jax.jit(grads).lower(x, x, x, at).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary("chunked", 1024), temporary("chunked", 4096)
    assert long < 4.5 * short
    assert long < 4096 * 4096 * 4 / 8  # an eighth of one [T, S] array
    assert temporary("reference", 4096) > 4096 * 4096 * 4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"k": 3}, "4 query heads are not a multiple of 3 key heads"),
        ({"implementation": "flash"}, "implementation='flash' is not one of"),
        ({"implementation": "fused", "dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "no dropout"),
        ({"slopes_N": np.ones(4, np.float32), "implementation": "chunked"}, "slopes_N needs a mask"),
    ],
)
def test_errors(changes, words):
    changes = dict(changes)
    q, k, v, _ = arrays(4, changes.pop("k", 2), "float32")
    with pytest.raises(ValueError, match=words):
        attend(q, k, v, scale=1.0, **changes)


def test_head_counts_are_checked():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        AttentionConfig(8, 4, 3, 2)
