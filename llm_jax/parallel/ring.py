"""Ring attention: a sequence divided over devices, whose keys and values go round.

Every device holds a stretch of each row. It attends with its own queries to the keys that it holds, passes keys and
values on to its neighbour, and adds up what it sees with an online softmax; the backward pass sends the keys round once
more, and their gradients with them. No device ever holds the keys of a whole row, and no scores are kept. The next
keys travel while the present ones are used.

Under a causal mask the first stretch would have almost nothing to do and the last everything. So the halves of the
stretches are exchanged before and after: device d attends for the d-th half and for the d-th from the end, and chunks
of which nothing is seen are skipped, equally many on all devices.

Sources: Liu et al. 2023, https://arxiv.org/abs/2310.01889; Brandon et al. 2023 (balanced work),
https://arxiv.org/abs/2311.09431; Rabe and Staats 2021 (online softmax), https://arxiv.org/abs/2112.05682.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.nn.attend import LOWEST, Mask, scores
from llm_jax.nn.protocols import Tree
from llm_jax.parallel.kernel import MeshKernel

cut = jax.lax.dynamic_slice_in_dim
Operands: TypeAlias = tuple[
    jax.Array, jax.Array, jax.Array, Mask, jax.Array | None
]  # queries, keys, values, ..., slopes
Saved: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, Mask, jax.Array | None, jax.Array, jax.Array]
Ways: TypeAlias = list[tuple[int, int]]  # (from, to)


class Keys(NamedTuple):
    """What goes round: `[B, S, K, H]` twice, `[B, S]` twice."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array | None

    def under(self, mask: Mask) -> Mask:
        """The mask of the queries at home for these keys."""
        return mask.replace(k_positions_BS=self.positions, k_segments_BS=self.segments, ordered=False)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most`."""
    return next(c for c in range(min(size, most), 0, -1) if size % c == 0)


def _seen_at_all(mask: Mask) -> jax.Array:
    """Whether any query may see any key; True where bounds cannot tell."""
    q, k = mask.q_positions_BT, mask.k_positions_BS
    seen = jnp.any(k >= 0)
    if mask.causal:
        seen &= jnp.min(jnp.where(k >= 0, k, jnp.iinfo(k.dtype).max)) <= jnp.max(q)
    if mask.window is not None:
        seen &= jnp.min(q) - jnp.max(k) < mask.window
    if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
        q, k = mask.q_segments_BT, mask.k_segments_BS
        seen &= (jnp.min(q) <= jnp.max(k)) & (jnp.min(k) <= jnp.max(q))
    return seen


def _is_balanced(mask: Mask) -> bool:
    """Whether devices exchange halves of their stretches, so that a causal mask costs all alike."""
    t, s = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    return mask.causal and t == s and t % 2 == 0


def _over_chunks(
    update: Callable[..., tuple[jax.Array, ...]],
    carry: tuple[jax.Array, ...],
    layout: tuple[tuple[str, int], ...],
    mask: Mask,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """`carry` after `update` for all chunks of queries and keys of which anything is seen.

    Args:
      update: `(parts of the carry, i, j, mask of the chunk) -> parts`, of queries from i and keys from j on.
      carry: arrays of all queries or keys.
      layout: for each array of the carry whether it is along `q` or `k`, and the axis.
      mask: of all.
      chunk: queries and keys at a time, at most.
    """
    t, s = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    half = 2 if _is_balanced(mask) else 1  # no chunk has of both halves: it would always be seen
    size = {"q": _divisor(t // half, chunk), "k": _divisor(s // half, chunk)}
    across = s // size["k"]

    def step(carry: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        at = {"q": index // across * size["q"], "k": index % across * size["k"]}
        part = mask.slice("q", at["q"], size["q"]).slice("k", at["k"], size["k"])
        parts = tuple(cut(x, at[along], size[along], axis) for x, (along, axis) in zip(carry, layout, strict=True))
        parts = jax.lax.cond(_seen_at_all(part), lambda p: update(p, at["q"], at["k"], part), lambda p: p, parts)
        put = jax.lax.dynamic_update_slice_in_dim
        triples = zip(carry, parts, layout, strict=True)
        return tuple(put(x, y, at[along], axis) for x, y, (along, axis) in triples), None

    return jax.lax.scan(step, carry, jnp.arange(t // size["q"] * across))[0]


def _look(sums, q_BTNH, keys, mask, slopes_N, scale, chunk):
    """The online softmax (highest `[B, K, G, T]`, total `[B, K, G, T]`, sum `[B, K, G, T, H]`) with more keys."""

    def update(sums, i, j, part):
        tq, tk = part.q_positions_BT.shape[1], part.k_positions_BS.shape[1]
        (top, total, acc), v = sums, cut(keys.values, j, tk, 1)
        s, seen = scores(cut(q_BTNH, i, tq, 1), cut(keys.keys, j, tk, 1), part, slopes_N, None, scale)
        highest = jnp.maximum(top, jnp.max(s, axis=-1))
        w = jnp.where(seen, jnp.exp(s - highest[..., None]), 0)
        shrink = jnp.exp(top - highest)
        more = jnp.einsum("bkgts,bskh->bkgth", w.astype(v.dtype), v, preferred_element_type=acc.dtype)
        return highest, total * shrink + jnp.sum(w, axis=-1), acc * shrink[..., None] + more

    return _over_chunks(update, sums, (("q", 3),) * 3, keys.under(mask), chunk)


def _look_back(grads, q_BTNH, keys, mask, slopes_N, scale, chunk, log_total, delta, dout_BKGTH):
    """(dq, dk, dv) with what these keys give, from weights computed anew."""
    product = functools.partial(jnp.einsum, preferred_element_type=log_total.dtype)

    def update(grads, i, j, part):
        tq, tk = part.q_positions_BT.shape[1], part.k_positions_BS.shape[1]
        q, k, v = cut(q_BTNH, i, tq, 1), cut(keys.keys, j, tk, 1), cut(keys.values, j, tk, 1)
        dout = cut(dout_BKGTH, i, tq, 3)
        s, seen = scores(q, k, part, slopes_N, None, scale)
        w = jnp.where(seen, jnp.exp(s - cut(log_total, i, tq, 3)[..., None]), 0)
        dw = product("bkgth,bskh->bkgts", dout, v)
        ds = (w * (dw - cut(delta, i, tq, 3)[..., None]) * scale).astype(q.dtype)
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        dq, dk, dv = grads
        dq = dq + product("bkgts,bskh->btkgh", ds, k).reshape(q.shape)
        dk = dk + product("bkgts,btkgh->bskh", ds, grouped)
        return dq, dk, dv + product("bkgts,bkgth->bskh", w.astype(dout.dtype), dout)

    return _over_chunks(update, grads, (("q", 1), ("k", 1), ("k", 1)), keys.under(mask), chunk)


def _pass_on(tree: Tree, axis: str) -> Tree:
    """Passes every device's `tree` to the next device of the ring."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(d, (d + 1) % size) for d in range(size)]), tree)


def _by_heads(x_BTNH: jax.Array, groups: int) -> jax.Array:
    """Groups query heads by key head: `[B, K, G, T, H]`."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4)


def _forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, axis, chunk):
    """The output, and log of the softmax's denominator `[B, K, G, T]`."""
    (b, t, n, h), k = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
    shape = (b, k, n // k, t)
    sums = (jnp.full(shape, LOWEST, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, h), wide))
    look = lambda sums, keys: _look(sums, q_BTNH, keys, mask, slopes_N, scale, chunk)
    hop = lambda carry, _: ((look(*carry), _pass_on(carry[1], axis)), None)
    home = Keys(k_BSKH, v_BSKH, mask.k_positions_BS, mask.k_segments_BS)
    (sums, keys), _ = jax.lax.scan(hop, (sums, home), length=jax.lax.axis_size(axis) - 1)
    highest, total, acc = look(sums, keys)
    total = jnp.where(total == 0, 1, total)  # of queries that see nothing
    out = (acc / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return out, highest + jnp.log(total)


def _backward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, out_BTNH, log_total, dout_BTNH, scale, axis, chunk):
    """Gradients of queries, keys and values."""
    wide, k = log_total.dtype, k_BSKH.shape[2]
    dout_BKGTH = _by_heads(dout_BTNH, k)
    delta = jnp.sum(dout_BKGTH.astype(wide) * _by_heads(out_BTNH, k).astype(wide), axis=-1)

    def back(grads, keys):
        return _look_back(grads, q_BTNH, keys, mask, slopes_N, scale, chunk, log_total, delta, dout_BKGTH)

    def hop(carry, _):  # the gradients of keys travel with them, and are at home after as many hops as devices
        (dq, dk, dv), keys = carry
        dq, dk, dv = back((dq, dk, dv), keys)
        return ((dq, *_pass_on((dk, dv), axis)), _pass_on(keys, axis)), None

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (q_BTNH, k_BSKH, v_BSKH))
    home = Keys(k_BSKH, v_BSKH, mask.k_positions_BS, mask.k_segments_BS)
    (grads, keys), _ = jax.lax.scan(hop, (zeros, home), length=jax.lax.axis_size(axis) - 1)
    dq, dk, dv = back(grads, keys)
    dk, dv = _pass_on((dk, dv), axis)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)


def _halves(axis_size: int) -> tuple[Ways, Ways]:
    """Who sends the first and the second half of its stretch to whom: of 2 P halves the c-th goes to c or 2P-1-c."""
    owner = lambda c: min(c, 2 * axis_size - 1 - c)
    first, second = ([(d, owner(2 * d + half)) for d in range(axis_size)] for half in (0, 1))
    return first, second


def _exchange(x: jax.Array, axis: str, back: bool = False) -> jax.Array:
    """Stretches of `x` `[B, T, ...]` with halves that cost alike under a causal mask, or back."""
    halves = jnp.split(x, 2, axis=1)
    turned = ([(b, a) for a, b in way] if back else way for way in _halves(jax.lax.axis_size(axis)))
    return jnp.concatenate([jax.lax.ppermute(h, axis, way) for h, way in zip(halves, turned, strict=True)], axis=1)


def _forward_here(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, *, scale, axis, chunk):
    """One device's part of the forward pass: (output, what the backward pass needs)."""
    balanced = _is_balanced(mask)
    turn = (lambda x: _exchange(x, axis)) if balanced else (lambda x: x)
    q_BTNH, k_BSKH, v_BSKH, mask = jax.tree.map(turn, (q_BTNH, k_BSKH, v_BSKH, mask))
    out, log_total = _forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, axis, chunk)
    saved = q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, out, log_total
    return (_exchange(out, axis, back=True) if balanced else out), saved


def _backward_here(saved, dout_BTNH, *, scale, axis, chunk):
    """The backward pass on one device."""
    balanced = _is_balanced(saved[3])
    grads = _backward(*saved, _exchange(dout_BTNH, axis) if balanced else dout_BTNH, scale, axis, chunk)
    return tuple(_exchange(g, axis, back=True) for g in grads) if balanced else grads


@dataclasses.dataclass(frozen=True)
class Ring(MeshKernel):
    """Ring attention on the devices of a mesh, as `Execution.kernel`; attributes as in `MeshKernel`.

    Attributes:
      sequence: mesh axis that the sequence is divided over.
      chunk: queries and keys at a time, at most.
    """

    sequence: str = dataclasses.field(kw_only=True)
    chunk: int = 512

    def fits(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask | None, sloped: bool, biased: bool) -> bool:
        """Whether rows, stretches and heads divide, and nothing but positions, segments and slopes says who sees whom.

        Args:
          q_BTNH: queries.
          k_BSKH: keys.
          mask: who may look where.
          sloped: ALiBi's slopes are added to the scores.
          biased: a bias is.
        """
        del sloped
        stretches = self.mesh.shape[self.sequence]
        plain = not biased and (mask is None or mask.allowed_BTS is None)
        whole = q_BTNH.shape[1] % stretches == k_BSKH.shape[1] % stretches == 0
        return plain and whole and k_BSKH.shape[0] == q_BTNH.shape[0] and self.divides(q_BTNH, k_BSKH)

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask | None,
        slopes_N: jax.Array | None,
        scale: float,
    ) -> jax.Array:
        """Attention of whole arrays, divided over the mesh; see `attend` for the arguments."""
        (b, t), s = q_BTNH.shape[:2], k_BSKH.shape[1]
        if mask is None:
            mask = Mask(jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32), causal=False)
        mask = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, x.shape[1])), mask)
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, self)

    def _specs(self) -> tuple[P, P, P, P]:
        """Mesh axes of states, positions, slopes, and of sums over keys."""
        rows, along, heads = self.rows, self.sequence, self.heads
        return P(rows, along, heads, None), P(rows, along), P(heads), P(rows, heads, None, along)

    def forward(self, operands: Operands, scale: float) -> tuple[jax.Array, Saved]:
        """Forward pass: (output, residuals of the backward pass)."""
        # as one: a scan over layers would compute the masks of all chunks, which need no states, ahead and keep them
        operands = jax.lax.optimization_barrier(operands)
        states, ids, slopes, sums = self._specs()
        inputs = states, states, states, ids, slopes
        run = jax.shard_map(
            functools.partial(_forward_here, scale=scale, axis=self.sequence, chunk=self.chunk),
            mesh=self.mesh,
            in_specs=inputs,
            out_specs=(states, (*inputs, states, sums)),
            check_vma=False,
        )
        return run(*operands)

    def backward(self, saved: Saved, dout_BTNH: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of queries, keys and values."""
        states, ids, slopes, sums = self._specs()
        run = jax.shard_map(
            functools.partial(_backward_here, scale=scale, axis=self.sequence, chunk=self.chunk),
            mesh=self.mesh,
            in_specs=((states, states, states, ids, slopes, states, sums), states),
            out_specs=(states, states, states),
            check_vma=False,
        )
        return run(saved, dout_BTNH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    slopes_N: jax.Array | None,
    scale: float,
    ring: Ring,
) -> jax.Array:
    return ring.forward((q_BTNH, k_BSKH, v_BSKH, mask, slopes_N), scale)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, ring):
    return ring.forward((q_BTNH, k_BSKH, v_BSKH, mask, slopes_N), scale)


def _attend_bwd(scale, ring, saved, dout_BTNH):
    return (*ring.backward(saved, dout_BTNH, scale), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
