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
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn.attend import LOWEST, Mask, scores

CHUNK = 512  # queries and keys at a time
cut = jax.lax.dynamic_slice_in_dim


class Keys(NamedTuple):
    """What goes round: `[B, S, K, H]` twice, `[B, S]` twice."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array | None

    def under(self, mask: Mask) -> Mask:
        """The mask of the queries at home for these keys."""
        return mask.replace(k_positions_BS=self.positions, k_segments_BS=self.segments, ordered=False)


def _chunk(size: int) -> int:
    """The largest divisor of `size` up to `CHUNK`."""
    return next(c for c in range(min(size, CHUNK), 0, -1) if size % c == 0)


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
    one: Callable[..., Any], carry: tuple[jax.Array, ...], places: tuple[tuple[str, int], ...], mask: Mask
) -> tuple[jax.Array, ...]:
    """`carry` after `one` for all chunks of queries and keys of which anything is seen.

    Args:
      one: `(parts of the carry, i, j, mask of the chunk) -> parts`, of queries from i and keys from j on.
      carry: arrays of all queries or keys.
      places: for each whether its parts are along `q` or `k`, and the axis.
      mask: of all.
    """
    t, s = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    half = 2 if _is_balanced(mask) else 1  # no chunk has of both halves: it would always be seen
    size = {"q": _chunk(t // half), "k": _chunk(s // half)}
    across = s // size["k"]

    def step(carry, index):
        at = {"q": index // across * size["q"], "k": index % across * size["k"]}
        part = mask.slice("q", at["q"], size["q"]).slice("k", at["k"], size["k"])
        parts = tuple(cut(x, at[of], size[of], axis) for x, (of, axis) in zip(carry, places, strict=True))
        parts = jax.lax.cond(_seen_at_all(part), lambda p: one(p, at["q"], at["k"], part), lambda p: p, parts)
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(x, y, at[of], axis) for x, y, (of, axis) in zip(carry, parts, places, strict=True)), None

    return jax.lax.scan(step, carry, jnp.arange(t // size["q"] * across))[0]


def _look(sums, q_BTNH, held: Keys, mask, slopes_N, scale):
    """The online softmax (highest `[B, K, G, T]`, total `[B, K, G, T]`, sum `[B, K, G, T, H]`) with more keys."""

    def one(sums, i, j, part):
        tq, tk = part.q_positions_BT.shape[1], part.k_positions_BS.shape[1]
        (top, total, acc), v = sums, cut(held.values, j, tk, 1)
        s, seen = scores(cut(q_BTNH, i, tq, 1), cut(held.keys, j, tk, 1), part, slopes_N, None, scale)
        highest = jnp.maximum(top, jnp.max(s, axis=-1))
        w = jnp.where(seen, jnp.exp(s - highest[..., None]), 0)
        shrink = jnp.exp(top - highest)
        more = jnp.einsum("bkgts,bskh->bkgth", w.astype(v.dtype), v, preferred_element_type=acc.dtype)
        return highest, total * shrink + jnp.sum(w, axis=-1), acc * shrink[..., None] + more

    return _over_chunks(one, sums, (("q", 3),) * 3, held.under(mask))


def _look_back(grads, q_BTNH, held: Keys, mask, slopes_N, scale, log_total, delta, dout_BKGTH):
    """(dq, dk, dv) with what these keys give, from weights computed anew."""
    product = functools.partial(jnp.einsum, preferred_element_type=log_total.dtype)

    def one(grads, i, j, part):
        tq, tk = part.q_positions_BT.shape[1], part.k_positions_BS.shape[1]
        q, k, v = cut(q_BTNH, i, tq, 1), cut(held.keys, j, tk, 1), cut(held.values, j, tk, 1)
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

    return _over_chunks(one, grads, (("q", 1), ("k", 1), ("k", 1)), held.under(mask))


def _pass_on(tree: Any, axis: str) -> Any:
    """Every device's `tree` to the next one."""
    size = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(d, (d + 1) % size) for d in range(size)]), tree)


def _by_heads(x_BTNH: jax.Array, groups: int) -> jax.Array:
    """`[B, K, G, T, H]`."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4)


def _forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, axis):
    """The output, and log of the softmax's denominator `[B, K, G, T]`."""
    (b, t, n, h), k = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
    shape = (b, k, n // k, t)
    sums = (jnp.full(shape, LOWEST, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, h), wide))
    look = lambda sums, held: _look(sums, q_BTNH, held, mask, slopes_N, scale)
    hop = lambda carry, _: ((look(*carry), _pass_on(carry[1], axis)), None)
    own = Keys(k_BSKH, v_BSKH, mask.k_positions_BS, mask.k_segments_BS)
    (sums, held), _ = jax.lax.scan(hop, (sums, own), length=jax.lax.axis_size(axis) - 1)
    highest, total, acc = look(sums, held)
    total = jnp.where(total == 0, 1, total)  # of what sees nothing
    out = (acc / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return out, highest + jnp.log(total)


def _backward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, out_BTNH, log_total, dout_BTNH, scale, axis):
    """Gradients of queries, keys and values."""
    wide, k = log_total.dtype, k_BSKH.shape[2]
    dout_BKGTH = _by_heads(dout_BTNH, k)
    delta = jnp.sum(dout_BKGTH.astype(wide) * _by_heads(out_BTNH, k).astype(wide), axis=-1)
    back = lambda grads, held: _look_back(grads, q_BTNH, held, mask, slopes_N, scale, log_total, delta, dout_BKGTH)

    def hop(carry, _):  # the gradients of keys travel with them, and are at home after as many hops as devices
        (dq, dk, dv), held = carry
        dq, dk, dv = back((dq, dk, dv), held)
        return ((dq, *_pass_on((dk, dv), axis)), _pass_on(held, axis)), None

    zeros = tuple(jnp.zeros(x.shape, wide) for x in (q_BTNH, k_BSKH, v_BSKH))
    own = Keys(k_BSKH, v_BSKH, mask.k_positions_BS, mask.k_segments_BS)
    (grads, held), _ = jax.lax.scan(hop, (zeros, own), length=jax.lax.axis_size(axis) - 1)
    dq, dk, dv = back(grads, held)
    dk, dv = _pass_on((dk, dv), axis)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)


def _halves(axis_size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Who sends the first and the second half of its stretch to whom: of 2 P halves the c-th goes to c or 2P-1-c."""
    owner = lambda c: min(c, 2 * axis_size - 1 - c)
    return tuple([(d, owner(2 * d + second)) for d in range(axis_size)] for second in (0, 1))  # type: ignore[return-value]


def _exchange(x: jax.Array, axis: str, back: bool = False) -> jax.Array:
    """Stretches of `x` `[B, T, ...]` with halves that cost alike under a causal mask, or back."""
    halves = jnp.split(x, 2, axis=1)
    turned = ([(b, a) for a, b in way] if back else way for way in _halves(jax.lax.axis_size(axis)))
    return jnp.concatenate([jax.lax.ppermute(h, axis, way) for h, way in zip(halves, turned, strict=True)], axis=1)


def _forward_here(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, axis):
    """One device's part of the forward pass: (output, what the backward pass needs)."""
    balanced = _is_balanced(mask)
    turn = (lambda x: _exchange(x, axis)) if balanced else (lambda x: x)
    q_BTNH, k_BSKH, v_BSKH, mask = jax.tree.map(turn, (q_BTNH, k_BSKH, v_BSKH, mask))
    out, log_total = _forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, axis)
    kept = q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, out, log_total
    return (_exchange(out, axis, back=True) if balanced else out), kept


def _backward_here(kept, dout_BTNH, scale, axis):
    """One device's part of the backward pass."""
    balanced = _is_balanced(kept[3])
    grads = _backward(*kept, _exchange(dout_BTNH, axis) if balanced else dout_BTNH, scale, axis)
    return tuple(_exchange(g, axis, back=True) for g in grads) if balanced else grads


@dataclasses.dataclass(frozen=True)
class Ring:
    """Ring attention on the devices of a mesh, as `Execution.kernel`.

    Attributes:
      mesh: the devices.
      rows: mesh axes that the rows are divided over.
      sequence: mesh axis of the stretches.
      heads: mesh axis of the heads, None where they are whole.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    sequence: str
    heads: str | None

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
        (b, t, n, _), (keys, s, k, _) = q_BTNH.shape, k_BSKH.shape
        parts = self.mesh.shape[self.heads] if self.heads else 1
        stretches = self.mesh.shape[self.sequence]
        rows = math.prod(self.mesh.shape[axis] for axis in self.rows)
        plain = not biased and (mask is None or mask.allowed_BTS is None)
        whole = b % rows == t % stretches == s % stretches == n % parts == k % parts == 0
        return plain and whole and keys == b

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

    def forward(self, *args: Any, scale: float) -> Any:
        """(output, what the backward pass needs)."""
        # as one: a scan over layers would compute the masks of all chunks, which need no states, ahead and keep them
        args = jax.lax.optimization_barrier(args)
        states, ids, slopes, sums = self._specs()
        kept = states, states, states, ids, slopes, states, sums
        here = functools.partial(_forward_here, scale=scale, axis=self.sequence)
        specs: dict[str, Any] = dict(in_specs=(states, states, states, ids, slopes), out_specs=(states, kept))
        return jax.shard_map(here, mesh=self.mesh, check_vma=False, **specs)(*args)

    def backward(self, kept: Any, dout_BTNH: jax.Array, scale: float) -> Any:
        """Gradients of queries, keys and values."""
        states, ids, slopes, sums = self._specs()
        here = functools.partial(_backward_here, scale=scale, axis=self.sequence)
        specs: dict[str, Any] = dict(
            in_specs=((states, states, states, ids, slopes, states, sums), states), out_specs=(states,) * 3
        )
        return jax.shard_map(here, mesh=self.mesh, check_vma=False, **specs)(kept, dout_BTNH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, ring):
    return ring.forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale=scale)[0]


def _attend_fwd(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale, ring):
    return ring.forward(q_BTNH, k_BSKH, v_BSKH, mask, slopes_N, scale=scale)


def _attend_bwd(scale, ring, kept, dout_BTNH):
    return (*ring.backward(kept, dout_BTNH, scale), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
