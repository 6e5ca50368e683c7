"""Attention masks, and softmax attention: one function with three implementations.

Sources: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ainslie et al. 2023 (grouped queries),
https://arxiv.org/abs/2305.13245; Rabe and Staats 2021 (attention in chunks, linear memory),
https://arxiv.org/abs/2112.05682; Beltagy et al. 2020 (sliding window), https://arxiv.org/abs/2004.05150.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.nn import weights

FEW_QUERIES = 16  # up to this many queries per key head, a CPU computes the product with its operands swapped
LOWEST = -1e30  # scores of hidden keys; finite, so that a fully hidden row gives zeros instead of NaN


class Mask(struct.PyTreeNode):
    """Which keys a query sees, as rules on positions and segments, so that no [T, S] array need exist.

    Attributes:
      q_positions_BT: positions of the queries.
      k_positions_BS: positions of the keys; negative ones are hidden from every query (padding, empty cache slots).
      q_segments_BT: document of each query; None if a row holds one document.
      k_segments_BS: document of each key.
      causal: a query sees positions up to its own.
      window: a query sees only the last `window` positions, its own included.
      ordered: queries and keys of every row are at 0, 1, 2, ... in one document. Then `causal` and `window` describe
        the mask, and the arrays are not read. Code that replaces positions must clear it, as `slice` does.
      allowed_BTS: bool, hides where False. For masks that no rule describes, such as XLNet's permutations; the only
        field of size T x S.
    """

    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_segments_BT: jax.Array | None = None
    k_segments_BS: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    ordered: bool = struct.field(pytree_node=False, default=False)
    allowed_BTS: jax.Array | None = None

    def dense(self) -> jax.Array:
        """The mask as an array: `[B, T, S]` bool, True where a query sees a key."""
        q, k = self.q_positions_BT[:, :, None], self.k_positions_BS[:, None, :]
        shape = jnp.broadcast_shapes(q.shape, k.shape)
        q, k = jnp.broadcast_to(q, shape), jnp.broadcast_to(k, shape)
        seen = k >= 0
        if self.causal:
            seen &= k <= q
        if self.window is not None:
            seen &= q - k < self.window
        if self.q_segments_BT is not None and self.k_segments_BS is not None:
            q = jnp.broadcast_to(self.q_segments_BT[:, :, None], shape)
            seen &= q == jnp.broadcast_to(self.k_segments_BS[:, None, :], shape)
        return seen if self.allowed_BTS is None else seen & self.allowed_BTS

    def distance(self) -> jax.Array:
        """`[B, T, S]`: query position minus key position."""
        return self.q_positions_BT[:, :, None] - self.k_positions_BS[:, None, :]

    def slice(self, axis: str, start: jax.Array, size: int) -> "Mask":
        """The mask of a chunk of queries (`axis="q"`) or keys (`"k"`)."""
        cut = lambda x, axis=1: None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        if axis == "q":
            new = dict(q_positions_BT=cut(self.q_positions_BT), q_segments_BT=cut(self.q_segments_BT))
        else:
            new = dict(k_positions_BS=cut(self.k_positions_BS), k_segments_BS=cut(self.k_segments_BS))
        new["allowed_BTS"] = cut(self.allowed_BTS, 1 if axis == "q" else 2)
        return self.replace(**new, ordered=False)


class Kernel(Protocol):
    """An attention kernel that supports some calls only: `parallel.splash.Splash`, `parallel.ring.Ring`."""

    def fits(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask | None, sloped: bool, biased: bool) -> bool:
        """Whether the kernel supports these sizes, this mask, and (if set) ALiBi slopes or a bias."""
        ...

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask | None,
        slopes_N: jax.Array | None,
        scale: float,
    ) -> jax.Array:
        """Attention of unsharded arrays, `[B, T, N, H]`; see `attend` for the arguments."""
        ...


def is_ordered(mask: Mask | None) -> bool:
    """Whether `causal` and `window` alone describe the mask, in a combination that kernels support."""
    return mask is None or (mask.ordered and (mask.causal or mask.window is None))


class _Plain:
    """The two products of attention, in the layout that XLA prefers."""

    @staticmethod
    def scores(q_BTKGH, k_BSKH, dtype):
        """`[B, K, G, T, S]`."""
        return jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=dtype)

    @staticmethod
    def values(w_BKGTS, v_BSKH):
        """`[B, T, K, G, H]`."""
        return jnp.einsum("bkgts,bskh->btkgh", w_BKGTS, v_BSKH)


class _Few:
    """The two products for few queries on a CPU, which repacks one operand of every product: here the small one."""

    @staticmethod
    def scores(q_BTKGH, k_BSKH, dtype):
        """`[B, K, G, T, S]`."""
        b, t, k, g, h = q_BTKGH.shape
        rows = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h)
        product = jnp.einsum("bskh,bkrh->bksr", k_BSKH, rows, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(product).swapaxes(2, 3).reshape(b, k, g, t, -1)

    @staticmethod
    def values(w_BKGTS, v_BSKH):
        """`[B, T, K, G, H]`."""
        b, k, g, t, s = w_BKGTS.shape
        product = jnp.einsum("bkrs,bskh->bkrh", w_BKGTS.reshape(b, k, g * t, s), v_BSKH)
        return jax.lax.optimization_barrier(product).reshape(b, k, g, t, -1).transpose(0, 3, 1, 2, 4)


def scores(q_BTNH, k_BSKH, mask, slopes_N, bias_BNTS, scale, products=_Plain):
    """Float32 scores `[B, K, N/K, T, S]`, with hidden keys at LOWEST, and the dense mask."""
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    q_BTKGH = weights.scaled(q_BTNH, scale).reshape(b, t, k, n // k, h)
    wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
    s = products.scores(q_BTKGH, k_BSKH, wide)
    grouped = lambda x_BNTS: x_BNTS.reshape(x_BNTS.shape[0], k, n // k, *x_BNTS.shape[2:])
    if slopes_N is not None:
        bias = -slopes_N[None, :, None, None] * mask.distance()[:, None].astype(wide)
        s = s + grouped(bias)
    if bias_BNTS is not None:
        s = s + jnp.broadcast_to(grouped(bias_BNTS).astype(wide), s.shape)
    seen = None if mask is None else jnp.broadcast_to(mask.dense()[:, None, None], s.shape)
    return (s if seen is None else jnp.where(seen, s, LOWEST)), seen


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout: sets a share `rate` of `x` to zero and divides the rest by 1 - rate."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, weights.wide(x) / (1 - rate), 0).astype(x.dtype)


def _reference(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale, rate=0.0, key=None, products=_Plain):
    s, seen = scores(q_BTNH, k_BSKH, mask, slopes_N, bias_BNTS, scale, products)
    w = jax.nn.softmax(s, axis=-1)
    if seen is not None:
        w = jnp.where(seen, w, 0)
    dropped = w if key is None else drop(w, rate, key)
    out = products.values(dropped.astype(v_BSKH.dtype), v_BSKH)
    b, k, g, t, size = w.shape
    return out.reshape(q_BTNH.shape), w.reshape(b, k * g, t, size)


def _cudnn_runs() -> bool:
    """Whether this is an NVIDIA GPU of compute capability 8.0 (Ampere) or newer."""
    device = jax.devices()[0]
    return (
        device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8  # type: ignore[attr-defined]
    )


def _ordered(q_BTNH, k_BSKH, v_BSKH, mask, scale):
    """Attention under an ordered mask; uses cuDNN's kernel, which stores no scores, where it runs."""
    causal = mask is not None and mask.causal
    window = (mask.window - 1, 0) if causal and mask.window is not None else None
    attend = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal, local_window_size=window)
    plain = jax.checkpoint(attend)
    t, s, h = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    fits = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and h % 8 == 0 and h <= 128 and t > 1 and t % 2 == s % 2 == 0
    if not (fits and _cudnn_runs()):
        return plain(q_BTNH, k_BSKH, v_BSKH)
    cudnn = functools.partial(attend, implementation="cudnn")
    return jax.lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, cuda=cudnn, default=plain)


@functools.partial(jax.checkpoint, static_argnums=(6,))
def _dense(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale):
    seen = None if mask is None else mask.dense()[:, None]
    if slopes_N is not None:
        distance = mask.distance()[:, None].astype(slopes_N.dtype)  # bfloat16 holds no odd number above 256
        alibi = -slopes_N[None, :, None, None] * distance
        bias_BNTS = alibi if bias_BNTS is None else alibi + bias_BNTS
    out = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, bias=bias_BNTS, mask=seen, scale=scale)
    if seen is not None:
        out = jnp.where(jnp.broadcast_to(jnp.any(seen, axis=-1)[:, 0, :, None, None], out.shape), out, 0)
    return out


def _fused(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale):
    """Saves queries, keys and values for the backward pass (kernels save the output too), but no scores."""
    if is_ordered(mask) and slopes_N is None and bias_BNTS is None:
        return _ordered(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    return _dense(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale)


@functools.partial(jax.checkpoint, static_argnums=(6,))
def _few(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale):
    """4 queries (beams) and 288 keys of 8 x 8 heads on two cores take 0.4 ms instead of 0.9."""
    return _reference(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale, products=_Few)[0]


def _pad(x, size, axis, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, constant_values=value)


def _chunked(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale, rate, key, q_chunk, k_chunk):
    b, t, n, h = q_BTNH.shape
    s, k = k_BSKH.shape[1], k_BSKH.shape[2]
    q_chunk, k_chunk = min(q_chunk, t), min(k_chunk, s)
    if mask is None:
        mask = Mask(jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32), causal=False)
    mask = mask.replace(
        q_positions_BT=_pad(mask.q_positions_BT, q_chunk, 1),
        k_positions_BS=_pad(mask.k_positions_BS, k_chunk, 1, value=-1),
        q_segments_BT=None if mask.q_segments_BT is None else _pad(mask.q_segments_BT, q_chunk, 1),
        k_segments_BS=None if mask.k_segments_BS is None else _pad(mask.k_segments_BS, k_chunk, 1),
        allowed_BTS=None if mask.allowed_BTS is None else _pad(_pad(mask.allowed_BTS, q_chunk, 1), k_chunk, 2),
    )
    if bias_BNTS is not None:
        bias_BNTS = _pad(_pad(bias_BNTS, q_chunk, 2), k_chunk, 3)
    q_BTNH, k_BSKH, v_BSKH = _pad(q_BTNH, q_chunk, 1), _pad(k_BSKH, k_chunk, 1), _pad(v_BSKH, k_chunk, 1)
    wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
    cut = jax.lax.dynamic_slice_in_dim

    @jax.checkpoint
    def queries(i):
        q = cut(q_BTNH, i * q_chunk, q_chunk, 1)
        mask_i = mask.slice("q", i * q_chunk, q_chunk)
        bias_i = None if bias_BNTS is None else cut(bias_BNTS, i * q_chunk, q_chunk, 2)

        def keys(carry, j):
            top, total, acc = carry
            bias = None if bias_i is None else cut(bias_i, j * k_chunk, k_chunk, 3)
            mask_ij = mask_i.slice("k", j * k_chunk, k_chunk)
            x, seen = scores(q, cut(k_BSKH, j * k_chunk, k_chunk, 1), mask_ij, slopes_N, bias, scale)
            new_top = jnp.maximum(top, jnp.max(x, axis=-1))
            w = jnp.where(seen, jnp.exp(x - new_top[..., None]), 0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(w, axis=-1)
            if key is not None:
                w = drop(w, rate, jax.random.fold_in(jax.random.fold_in(key, i), j))
            v = cut(v_BSKH, j * k_chunk, k_chunk, 1)
            acc = acc * shrink[..., None] + jnp.einsum("bkgts,bskh->bkgth", w.astype(v.dtype), v).astype(wide)
            return (new_top, total, acc), None

        shape = (b, k, n // k, q_chunk)
        start = (jnp.full(shape, LOWEST, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, h), wide))
        (_, total, acc), _ = jax.lax.scan(keys, start, jnp.arange(k_BSKH.shape[1] // k_chunk))
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return out.transpose(0, 3, 1, 2, 4).reshape(b, q_chunk, n, h).astype(q.dtype)

    out = jax.lax.map(queries, jnp.arange(q_BTNH.shape[1] // q_chunk))
    return out.transpose(1, 0, 2, 3, 4).reshape(b, -1, n, h)[:, :t]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask | None = None,
    *,
    scale: float,
    implementation: str = "auto",
    slopes_N: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    q_chunk: int = 256,
    k_chunk: int = 256,
    kernel: Kernel | None = None,
) -> jax.Array:
    """Softmax attention; scores and softmax in float32 (float64 for float64 inputs).

    Args:
      q_BTNH: queries.
      k_BSKH: keys; K divides N, query head n reads key head n // (N / K).
      v_BSKH: values.
      mask: which keys a query sees; None means all. A fully hidden row returns zeros.
      scale: usually H ** -0.5.
      implementation: `reference` (einsum, [T, S] scores), `fused` (`jax.nn.dot_product_attention`, no dropout),
        `chunked` (online softmax, memory linear in T and S), `auto` (fused unless dropout is on or the inputs are
        float64). With an ordered mask in half precision on CUDA, `fused` runs cuDNN's kernel, which has no second
        derivative and cannot be mapped (`vmap`) over some operands only; `chunked` and `reference` have no such limit.
      slopes_N: ALiBi slopes; needs a mask, whose positions give the distances.
      bias_BNTS: added to the scores, B or 1 rows.
      dropout_rate: share of attention weights dropped where `dropout_key` is given.
      dropout_key: turns dropout on.
      q_chunk: queries per chunk (chunked).
      k_chunk: keys per chunk (chunked).
      kernel: runs instead of `auto` and `fused` where it fits and dropout is off (`splash.Splash`, `ring.Ring`).

    Returns:
      `[B, T, N, H]` in the dtype of `q_BTNH`.

    Raises:
      ValueError: if N is not a multiple of K, `fused` is asked for with dropout, or slopes come without a mask.
    """
    if slopes_N is not None and mask is None:
        raise ValueError("slopes_N needs a mask, whose positions give the distances")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are not a multiple of {k_BSKH.shape[2]} key heads")
    if dropout_rate == 0:
        dropout_key = None
    plain = implementation in ("auto", "fused") and dropout_key is None
    if plain and kernel is not None and kernel.fits(q_BTNH, k_BSKH, mask, slopes_N is not None, bias_BNTS is not None):
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale)
    if implementation == "auto":
        fused = dropout_key is None and q_BTNH.dtype != jnp.float64  # the fused softmax is float32 at most
        implementation = "fused" if fused else "reference"
    args = (q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, bias_BNTS, scale)
    if implementation == "reference":
        return _reference(*args, dropout_rate, dropout_key)[0]
    if implementation == "chunked":
        return _chunked(*args, dropout_rate, dropout_key, q_chunk, k_chunk)
    if implementation != "fused":
        raise ValueError(f"implementation={implementation!r} is not one of auto, reference, fused, chunked")
    if dropout_key is not None:
        raise ValueError("fused attention has no dropout; use reference or chunked, or dropout_rate=0")
    if q_BTNH.dtype == jnp.float16:  # XLA:CPU has no such product
        reference = jax.checkpoint(lambda *a: _reference(*a, scale)[0])
        return jax.lax.platform_dependent(*args[:-1], cpu=reference, default=lambda *a: _fused(*a, scale))
    queries = q_BTNH.shape[1] * (q_BTNH.shape[2] // k_BSKH.shape[2])  # to one head of keys
    if 1 < queries <= FEW_QUERIES and k_BSKH.shape[1] >= 4 * queries:
        few, whole = ((lambda *a, f=f: f(*a, scale)) for f in (_few, _fused))
        return jax.lax.platform_dependent(*args[:-1], cpu=few, default=whole)
    return _fused(*args)


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: Mask | None = None,
    *,
    scale: float,
    slopes_N: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """The softmax weights `[B, N, T, S]` (without dropout) that `attend` uses."""
    return _reference(q_BTNH, k_BSKH, k_BSKH, mask, slopes_N, bias_BNTS, scale)[1]
