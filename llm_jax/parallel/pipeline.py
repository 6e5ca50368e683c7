"""Pipeline parallelism: one interpreter for every schedule, for any model whose layers are one stack.

A model is taken apart without its knowing: `nn.Stack` hands its layers to a runner, and two runners are enough. One
keeps what flows into the stack (the embedding's part of the model), one puts in what flows out of it (the head's part).
Between them the interpreter runs the schedule's table, tick by tick, in `shard_map` over the mesh axis `pipe`; the
other axes stay automatic, so tensor parallelism and ZeRO go on inside a stage.

A stage keeps its inputs only and recomputes in the backward. Every tick ends with one permutation of activations to the
next device and one of their gradients to the previous one; branches only compute, so devices that do different things
never wait for each other inside of one.

Sources: see `schedules`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn.stack import Call
from llm_jax.parallel.schedules import Schedule

Tree = Any


class PipelineError(ValueError):
    """A model that cannot be cut into stages; one line that says why."""


class Cut(NamedTuple):
    """Layers of L in pieces of equal length, padded with layers that do nothing.

    Attributes:
      layers: L.
      pieces: p * v.
      each: layers a piece, the last ones of the last pieces padding.
    """

    layers: int
    pieces: int

    @property
    def each(self) -> int:
        """Layers a piece."""
        return -(-self.layers // self.pieces)

    def pieces_of(self, x: jax.Array, devices: int) -> jax.Array:
        """`[L, ...]` as `[p, v, each, ...]`: device d has pieces d, d + p, ..."""
        pad = self.each * self.pieces - self.layers
        x = jnp.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)]) if pad else x
        return x.reshape(-1, devices, self.each, *x.shape[1:]).swapaxes(0, 1)

    def whole(self, x: jax.Array) -> jax.Array:
        """Undoes `pieces_of`."""
        return x.swapaxes(0, 1).reshape(self.each * self.pieces, *x.shape[3:])[: self.layers]


def stacks(params: Tree) -> dict[tuple[str, ...], Tree]:
    """Every stack's parameters by its path.

    Raises:
      PipelineError: if there is none, layers are unstacked, or some have parameters of their own.
    """
    found: dict[tuple[str, ...], Tree] = {}

    def visit(tree: Tree, path: tuple[str, ...]) -> None:
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                if key == "per_layer":
                    raise PipelineError("plan.pipe: layers with parameters of their own (per_layer) are no stages")
                if key != "layers":
                    visit(value, (*path, key))
                elif isinstance(value, Mapping) and "0" in value:
                    raise PipelineError("plan.pipe: layers that differ cannot be stages; stack them")
                else:
                    found[path] = value

    visit(params, ())
    if not found:
        raise PipelineError("plan.pipe: the model has no stack of layers to cut into stages")
    return found


def put(params: Tree, layers: Mapping[tuple[str, ...], Tree]) -> Tree:
    """`params` with other layers in the stacks at these paths."""
    for path, value in layers.items():
        params = _put(params, (*path, "layers"), value)
    return params


def _put(params: Tree, path: tuple[str, ...], value: Tree) -> Tree:
    return value if not path else {**params, path[0]: _put(params[path[0]], path[1:], value)}


def taking(kept: list[Call], results: Sequence[Any] = ()) -> Callable[[Call], tuple[Any, Any]]:
    """A stack runner that gives the first stacks their results and keeps the other calls, running nothing."""
    done = list(results)

    def run(call: Call) -> tuple[Any, Any]:
        if call.per_layer is not None:
            raise PipelineError("plan.pipe: a cache or memories have no place in a pipeline")
        if done:
            return done.pop(0), _outputs(call)
        kept.append(call)
        return call.carry, _outputs(call)

    return run


def _outputs(call: Call) -> Any:
    """What the layers would return beside the carry; not-a-number in every place, so that nobody can use it."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), call.params)
    shapes = jax.eval_shape(lambda p, c, s: call.layer(p, 0, c, None, s)[1], one, call.carry, call.context)
    if shapes is None:
        return None
    bad = lambda x: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
    return tuple(jax.tree.map(bad, shapes) for _ in call.group_of)


def tables(schedule: Schedule) -> dict[str, np.ndarray]:
    """The schedule as arrays `[ticks, p]`.

    `op` is 0 idle, 1 F, 2 B, 3 W, and 4, 5, 6 the same on the last piece. `micro` and `chunk` name the item. `get` is 1
    where the device's left neighbour has just made its input (`get_micro`, `get_chunk`: for which item), `back` the
    same for the gradient from the right.
    """
    p, last = schedule.stages, schedule.stages * schedule.chunks - 1
    names = ("op", "micro", "chunk", "get", "get_micro", "get_chunk", "back", "back_micro", "back_chunk")
    out = {name: np.zeros((len(schedule.ticks), p), np.int32) for name in names}
    for t, tick in enumerate(schedule.ticks):
        for d, item in enumerate(tick):
            if item is None:
                continue
            piece = item.chunk * p + d
            out["op"][t, d] = "FBW".index(item.kind) + 1 + 3 * (piece == last)
            out["micro"][t, d], out["chunk"][t, d] = item.micro, item.chunk
            if item.kind == "F" and piece < last:
                to, chunk = (d + 1) % p, (piece + 1) // p
                out["get"][t, to], out["get_micro"][t, to], out["get_chunk"][t, to] = 1, item.micro, chunk
            if item.kind == "B" and piece:
                to, chunk = (d - 1) % p, (piece - 1) // p
                out["back"][t, to], out["back_micro"][t, to], out["back_chunk"][t, to] = 1, item.micro, chunk
    return out


def branch_shares(schedule: Schedule) -> list[float]:
    """How often a device takes each of a tick's branches, of all ticks; of the device that does most."""
    op = tables(schedule)["op"]
    counts = [[(op[:, d] == i).mean() for i in range(7)] for d in range(schedule.stages)]
    return [float(x) for x in min(counts, key=lambda row: row[0] + row[4])]


def slots(schedule: Schedule, table: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Places a chunk for inputs and for gradients, so that micro-batch i can live at i modulo their number."""
    end = 3 if schedule.splits else 2

    def places(prefix: str) -> int:
        spans: dict[tuple[int, int, int], list[int]] = {}
        for t, d in zip(*np.nonzero(table[prefix]), strict=True):
            spans[d, table[f"{prefix}_chunk"][t, d], table[f"{prefix}_micro"][t, d]] = [t]
        for t, d in zip(*np.nonzero(np.isin(table["op"], (end, end + 3))), strict=True):
            key = (d, table["chunk"][t, d], table["micro"][t, d])
            if key in spans:
                spans[key].append(t)
        for count in range(1, schedule.micros + 1):
            taken: dict[tuple[int, int, int], list[list[int]]] = {}
            for (d, c, i), span in spans.items():
                taken.setdefault((d, c, i % count), []).append(span)
            # an arrival is written after the tick's work, so a place may be taken in the tick that frees it
            if all(a[1] <= b[0] for row in taken.values() for a, b in zip(sorted(row), sorted(row)[1:], strict=False)):
                return count
        return schedule.micros

    return places("get"), places("back")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def divide(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """(floating leaves, function that puts others in their places)."""
    leaves, form = jax.tree.flatten(tree)
    chosen = [_is_float(x) for x in leaves]

    def join(some: list[Any]) -> Tree:
        new = iter(some)
        return jax.tree.unflatten(form, [next(new) if c else x for c, x in zip(chosen, leaves, strict=True)])

    return [x for c, x in zip(chosen, leaves, strict=True) if c], join


def _stage(layer: Callable[..., Any], cut: Cut, own: Tree, x: Any, context: Any, piece: jax.Array) -> Any:
    """The layers of one piece, each recomputed in the backward."""

    def one(carry: Any, item: Any) -> tuple[Any, None]:
        own, i = item
        after = layer(own, i, carry, context)
        if cut.layers < cut.each * cut.pieces:
            after = jax.tree.map(lambda a, b: jnp.where(i < cut.layers, a, b), after, carry)
        return after, None

    indices = piece * cut.each + jnp.arange(cut.each)
    return jax.lax.scan(jax.checkpoint(one, prevent_cse=False), x, (own, indices))[0]


def forward(
    mesh: Mesh,
    cut: Cut,
    layer: Callable[[Tree, Any, Any, Any], Any],
    layers: Tree,
    inputs: Tree,
    contexts: Tree,
) -> Tree:
    """GPipe's forward of one stack, whose backward is autodiff's: for models of several stacks.

    Args:
      mesh: with the axis `pipe`.
      cut: into as many pieces as the axis has devices.
      layer: see `run`.
      layers: stacked, `[L, ...]`.
      inputs: what flows into the first layer, `[M, ...]`.
      contexts: what all layers of a micro-batch see, `[M, ...]`.

    Returns:
      What flows out of the last layer, `[M, ...]`.
    """
    p, micros = cut.pieces, jax.tree.leaves(inputs)[0].shape[0]

    def local(parts: Tree, inputs: Tree, contexts: Tree) -> Tree:
        device = jax.lax.axis_index("pipe")
        own = jax.tree.map(lambda x: x[0, 0], parts)
        pick = lambda tree, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
        run = jax.checkpoint(lambda own, x, context: _stage(layer, cut, own, x, context, device), prevent_cse=False)

        def tick(state: Any, t: jax.Array) -> tuple[Any, Any]:
            micro = jnp.clip(t - device, 0, micros - 1)
            x = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), pick(inputs, micro), state)
            y = run(own, x, pick(contexts, micro))
            pairs = [(i, i + 1) for i in range(p - 1)]
            return jax.tree.map(lambda a: jax.lax.ppermute(a, "pipe", pairs), y), y

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), inputs)
        _, out = jax.lax.scan(tick, start, jnp.arange(micros + p - 1))
        return jax.tree.map(lambda y: y[None, p - 1 :], out)  # where the last device has them

    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    on = lambda tree, spec: jax.tree.map(lambda _: spec, tree)
    specs = on(parts, P("pipe")), on(inputs, P()), on(contexts, P())
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=on(inputs, P("pipe")), axis_names={"pipe"}, check_vma=False
    )
    return jax.tree.map(lambda y: y[-1], run(parts, inputs, contexts))


def run(
    schedule: Schedule,
    mesh: Mesh,
    cut: Cut,
    layer: Callable[[Tree, Any, Any, Any], Any],
    finish: Callable[[Tree, Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    layers: Tree,
    outer: Tree,
    inputs: Tree,
    contexts: Tree,
    batches: Tree,
) -> tuple[jax.Array, dict[str, jax.Array], Tree, Tree, Tree, Tree]:
    """Runs a schedule: losses and gradients of all micro-batches.

    Args:
      schedule: what happens when.
      mesh: with the axis `pipe`.
      cut: layers and pieces.
      layer: `(params of one layer, its index, carry, context) -> carry`.
      finish: `(outer, carry, micro-batch) -> (loss, scores)`: the head and the objective.
      layers: stacked, `[L, ...]`, floating leaves differentiated.
      outer: all other parameters, floating leaves differentiated.
      inputs: what flows into the first layer, `[M, ...]`.
      contexts: what all layers of a micro-batch see, `[M, ...]`.
      batches: what `finish` needs, `[M, ...]`.

    Returns:
      (loss, scores, gradients of layers, of outer, of inputs, of the contexts' floating leaves): sums over
      micro-batches, the last two `[M, ...]`.
    """
    p, v = schedule.stages, schedule.chunks
    table = tables(schedule)
    keeps, keeps_back = slots(schedule, table)

    def local(layers: Tree, outer: Tree, inputs: Tree, contexts: Tree, batches: Tree, rows: Mapping[str, Any]) -> Any:
        device = jax.lax.axis_index("pipe")
        layers = jax.tree.map(lambda x: x[0], layers)  # [v, each, ...]
        pick = lambda tree, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
        zeros = lambda tree, dtype=None: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)
        floats = lambda tree: divide(tree)[0]

        def stage(own: Tree, x: Any, context: Any, chunk: jax.Array) -> Any:
            return _stage(layer, cut, own, x, context, chunk * p + device)

        def branches(own: Tree, x: Any, dy: Any, context: Any, micro: Any, chunk: jax.Array) -> list[Callable[[], Any]]:
            own_f, own_of = divide(own)
            outer_f, outer_of = divide(outer)
            context_f, context_of = divide(context)
            score_zero = jax.eval_shape(finish, outer, x, micro)
            nothing = lambda: (
                zeros(x),
                zeros(x),
                zeros(own_f, jnp.float32),
                zeros(outer_f, jnp.float32),
                zeros(context_f),
                zeros(score_zero),
            )
            through = lambda o, x, c: stage(own_of(o), x, context_of(c), chunk)
            wide = lambda tree: jax.tree.map(lambda g: g.astype(jnp.float32), tree)

            def end(o: Any, x: Any, c: Any, out: Any) -> Any:
                return finish(outer_of(out), through(o, x, c), micro)

            def forward() -> Any:
                return (through(own_f, x, context_f), *nothing()[1:])

            def backward(of_inputs: bool, of_weights: bool) -> Any:
                y, _, d_own, d_outer, d_context, scores = nothing()
                if of_inputs and of_weights:
                    _, pull = jax.vjp(through, own_f, x, context_f)
                    d_own, dx, d_context = pull(dy)
                elif of_inputs:
                    _, pull = jax.vjp(lambda x: through(own_f, x, context_f), x)
                    (dx,) = pull(dy)
                else:
                    _, pull = jax.vjp(lambda o, c: through(o, x, c), own_f, context_f)
                    (d_own, d_context), dx = pull(dy), zeros(x)
                return y, dx, wide(d_own), d_outer, d_context, scores

            def backward_last(of_inputs: bool, of_weights: bool) -> Any:
                y, dx, d_own, d_outer, d_context, scores = nothing()
                one = jnp.ones((), jnp.float32)
                if of_inputs and of_weights:
                    loss, pull, scored = jax.vjp(end, own_f, x, context_f, outer_f, has_aux=True)
                    d_own, dx, d_context, d_outer = pull(one)
                    scores = (loss, scored)
                elif of_inputs:
                    loss, pull, scored = jax.vjp(lambda x: end(own_f, x, context_f, outer_f), x, has_aux=True)
                    (dx,), scores = pull(one), (loss, scored)
                else:
                    weights_only = lambda o, c, out: end(o, x, c, out)
                    _, pull, _ = jax.vjp(weights_only, own_f, context_f, outer_f, has_aux=True)
                    d_own, d_context, d_outer = pull(one)
                return y, dx, wide(d_own), wide(d_outer), d_context, scores

            first = functools.partial(backward, True, not schedule.splits)
            first_last = functools.partial(backward_last, True, not schedule.splits)
            second, second_last = (functools.partial(f, False, True) for f in (backward, backward_last))
            return [nothing, forward, first, second, nothing, first_last, second_last]

        def tick(state: Any, row: Mapping[str, Any]) -> tuple[Any, None]:
            held, back, d_layers, d_outer, d_inputs, d_contexts, total = state
            at = {name: x[device] for name, x in row.items()}
            micro, chunk = at["micro"], at["chunk"]
            entry = (device == 0) & (chunk == 0)
            stored = pick(pick(held, chunk), micro % keeps)
            x = jax.tree.map(lambda a, b: jnp.where(entry, a, b), pick(inputs, micro), stored)
            dy = pick(pick(back, chunk), micro % keeps_back)
            own, context, batch = pick(layers, chunk), pick(contexts, micro), pick(batches, micro)
            done = jax.lax.switch(at["op"], branches(own, x, dy, context, batch, chunk))
            y, dx, d_own, d_out, d_context, scores = done

            add_at = lambda tree, i, more: jax.tree.map(lambda a, b: a.at[i].add(b.astype(a.dtype)), tree, more)
            d_layers = add_at(d_layers, chunk, d_own)
            d_outer = jax.tree.map(jnp.add, d_outer, d_out)
            d_contexts = add_at(d_contexts, micro, d_context)
            total = jax.tree.map(jnp.add, total, scores)
            enters = entry & (at["op"] % 3 == 2)
            d_inputs = add_at(d_inputs, micro, jax.tree.map(lambda g: jnp.where(enters, g, 0), dx))
            round_ = [(i, (i + 1) % p) for i in range(p)]
            send = lambda tree, pairs: jax.tree.map(lambda a: jax.lax.ppermute(a, "pipe", pairs), tree)
            y, dx = send(y, round_), send(dx, [(b, a) for a, b in round_])

            def keep(tree: Tree, new: Tree, name: str, count: int) -> Tree:
                i = at[f"{name}_chunk"], at[f"{name}_micro"] % count
                return jax.tree.map(lambda a, b: a.at[i].set(jnp.where(at[name] > 0, b, a[i])), tree, new)

            held, back = keep(held, y, "get", keeps), keep(back, dx, "back", keeps_back)
            return (held, back, d_layers, d_outer, d_inputs, d_contexts, total), None

        one = jax.tree.map(lambda x: x[0], inputs)
        room = lambda count: jax.tree.map(lambda x: jnp.zeros((v, count, *x.shape), x.dtype), one)
        scores = jax.eval_shape(finish, outer, one, jax.tree.map(lambda x: x[0], batches))
        start = (
            room(keeps),
            room(keeps_back),
            zeros(floats(layers), jnp.float32),
            zeros(floats(outer), jnp.float32),
            zeros(inputs),
            zeros(floats(contexts)),
            zeros(scores),
        )
        (_, _, d_layers, d_outer, d_inputs, d_contexts, total), _ = jax.lax.scan(tick, start, rows)
        together = lambda tree: jax.tree.map(lambda x: jax.lax.psum(x, "pipe"), tree)
        d_layers = jax.tree.map(lambda x: x[None], d_layers)
        d_inputs = jax.tree.map(lambda x: x[None], d_inputs)  # the first device's are the ones
        return total, d_layers, together(d_outer), d_inputs, together(d_contexts)

    spread = lambda tree: jax.tree.map(lambda _: P("pipe"), tree)
    alike = lambda tree: jax.tree.map(lambda _: P(), tree)
    layers_f, layers_of = divide(layers)
    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    rows = {name: jnp.asarray(x) for name, x in table.items()}
    arguments = (parts, outer, inputs, contexts, batches, rows)
    specs = (spread(parts), *(alike(a) for a in arguments[1:]))
    outer_f, outer_of = divide(outer)
    context_f, _ = divide(contexts)
    scores = jax.eval_shape(finish, outer, *(jax.tree.map(lambda x: x[0], t) for t in (inputs, batches)))
    out_specs = (alike(scores), [P("pipe")] * len(layers_f), alike(outer_f), spread(inputs), alike(context_f))
    total_of = lambda total: (jax.tree.map(lambda x: jax.lax.psum(x, "pipe"), total[0]), *total[1:])
    run = jax.shard_map(
        lambda *a: total_of(local(*a)),
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names={"pipe"},
        check_vma=False,
    )
    (loss, scores), d_layers, d_outer, d_inputs, d_contexts = run(*arguments)
    d_inputs = jax.tree.map(lambda x: x[0], d_inputs)
    return loss, scores, layers_of([cut.whole(g) for g in d_layers]), outer_of(d_outer), d_inputs, d_contexts
