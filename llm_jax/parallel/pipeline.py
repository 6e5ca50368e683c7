"""Pipeline parallelism: one interpreter for every schedule, for any model whose layers are one stack.

A model is taken apart without its knowing: `nn.Stack` hands its layers to a runner, which keeps what flows in (one pass
of `apply`, the embedding's part of the model) or puts in what flows out (another, the head's part). Between them the
interpreter runs the schedule's table, tick by tick, in `shard_map` over the mesh axis `pipe`; the other axes stay
automatic, so tensor parallelism and ZeRO go on inside a stage.

A stage keeps what flows into its layers and computes each again in the backward, whose gradients are summed in place,
layer by layer, divided as ZeRO keeps them. Where weight gradients come later (zero bubble) it keeps its inputs and what
they need, and a tick adds a whole gradient. Every tick ends with one permutation of activations to the next device and
one of their gradients to the previous one. What a tick computes sums over `model` and `data` among devices that are at
the same; it reshards nothing else.

Beside what a schedule holds, every stage has the whole batch's inputs of the first layer and their gradients.

Sources: see `schedules`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn.stack import Call
from llm_jax.parallel.schedules import Schedule, slots, tables

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
            return done.pop(0), unusable_outputs(call)
        kept.append(call)
        return call.carry, unusable_outputs(call)

    return run


def unusable_outputs(call: Call) -> Any:
    """What the layers would return beside the carry; not-a-number in every place, so that nobody can use it."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), call.params)
    shapes = jax.eval_shape(lambda p, c, s: call.layer(p, 0, c, None, s)[1], one, call.carry, call.context)
    if shapes is None:
        return None
    bad = lambda x: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
    return tuple(jax.tree.map(bad, shapes) for _ in call.group_of)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _pick(tree: Tree, i: jax.Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _send(tree: Tree, pairs: list[tuple[int, int]]) -> Tree:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipe", pairs), tree)


def _everywhere(tree: Tree, spec: P) -> Tree:
    return jax.tree.map(lambda _: spec, tree)


def divide(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """(floating leaves, function that puts others in their places)."""
    leaves, form = jax.tree.flatten(tree)
    chosen = [_is_float(x) for x in leaves]

    def join(some: list[Any]) -> Tree:
        new = iter(some)
        return jax.tree.unflatten(form, [next(new) if c else x for c, x in zip(chosen, leaves, strict=True)])

    return [x for c, x in zip(chosen, leaves, strict=True) if c], join


class Stage:
    """The layers of one piece as a function."""

    def __init__(self, layer: Callable[..., Any], cut: Cut, remat: Callable[[Any], Any]) -> None:
        """`layer` as in `run`; `remat` wraps it."""
        self.cut, self.layer, self.remat = cut, layer, remat

    def one(self, own: Tree, i: jax.Array, x: Any, context: Any) -> Any:
        """One layer; padding does nothing."""
        y = self.layer(own, i, x, context)
        if self.cut.layers == self.cut.each * self.cut.pieces:
            return y
        return jax.tree.map(lambda a, b: jnp.where(i < self.cut.layers, a, b), y, x)

    def indices(self, piece: jax.Array) -> jax.Array:
        """Numbers of its layers."""
        return piece * self.cut.each + jnp.arange(self.cut.each)

    def __call__(self, own: Tree, x: Any, context: Any, piece: jax.Array) -> Any:
        """What flows out of the piece."""
        run = self.remat(lambda x, item: (self.one(*item, x, context), None))
        return jax.lax.scan(run, x, (own, self.indices(piece)))[0]

    def reversible(self, own: Tree, x: Any, context: Any, piece: jax.Array) -> tuple[Any, Any, Any]:
        """(what flows out, what flows into every layer, every layer's pull-back to its input)."""

        def run(x: Any, item: Any) -> tuple[Any, Any]:
            y, pull = jax.vjp(lambda x: self.one(*item, x, context), x)
            return y, (x, pull)

        y, (into, pulls) = jax.lax.scan(run, x, (own, self.indices(piece)))
        return y, into, pulls

    def of_inputs(self, pulls: Any, dy: Any) -> tuple[Any, Any]:
        """(gradient of the piece's input, of what flows out of every layer)."""
        return jax.lax.scan(lambda dy, pull: (pull(dy)[0], dy), dy, pulls, reverse=True)

    def of_weights(self, own: Tree, into: Any, outof: Any, context: Any, piece: jax.Array) -> tuple[Any, Any]:
        """(gradients of the parameters' floating leaves, of the context's), of what `of_inputs` left."""
        context_f, context_of = divide(context)

        def run(total: Any, item: Any) -> tuple[Any, Any]:
            own, i, x, dy = item
            own_f, own_of = divide(own)
            _, pull = jax.vjp(lambda o, c: self.one(own_of(o), i, x, context_of(c)), own_f, context_f)
            d_own, d_context = pull(dy)
            return jax.tree.map(jnp.add, total, d_context), d_own

        start = jax.tree.map(jnp.zeros_like, context_f)
        d_context, d_own = jax.lax.scan(run, start, (own, self.indices(piece), into, outof))
        return d_own, d_context


def forward(
    mesh: Mesh,
    cut: Cut,
    layer: Callable[[Tree, Any, Any, Any], Any],
    layers: Tree,
    inputs: Tree,
    contexts: Tree,
    remat: Callable[[Any], Any] = lambda f: f,
) -> Tree:
    """GPipe's forward of one stack, whose backward is autodiff's: for models of several stacks.

    Args:
      mesh: with the axis `pipe`.
      cut: into as many pieces as the axis has devices.
      layer: see `run`.
      layers: stacked, `[L, ...]`.
      inputs: what flows into the first layer, `[M, ...]`.
      contexts: what all layers of a micro-batch see, `[M, ...]`.
      remat: wraps every layer (`jax.checkpoint` with a policy).

    Returns:
      What flows out of the last layer, `[M, ...]`.
    """
    p, micros = cut.pieces, jax.tree.leaves(inputs)[0].shape[0]
    given = inputs, contexts

    def local(parts: Tree, inputs: Tree, contexts: Tree) -> Tree:
        device = jax.lax.axis_index("pipe")
        inputs, contexts = jax.tree.map(lambda x, own: x.astype(own.dtype), (inputs, contexts), given)
        own = jax.tree.map(lambda x: x[0, 0], parts)
        stage = Stage(layer, cut, remat)
        run = jax.checkpoint(lambda own, x, context: stage(own, x, context, device), prevent_cse=False)

        def tick(state: Any, t: jax.Array) -> tuple[Any, Any]:
            micro = jnp.clip(t - device, 0, micros - 1)
            x = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), _pick(inputs, micro), state)
            y = run(own, x, _pick(contexts, micro))
            pairs = [(i, i + 1) for i in range(p - 1)]
            return _send(y, pairs), y

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), inputs)
        _, out = jax.lax.scan(tick, start, jnp.arange(micros + p - 1))
        return jax.tree.map(lambda y: y[None, p - 1 :], out)  # where the last device has them

    # their gradients are summed over `pipe`, in float32: XLA:CPU has no sum of bfloat16 where some axes are manual only
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_float(x) else x
    inputs, contexts = jax.tree.map(wide, given)
    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    specs = tuple(_everywhere(*a) for a in ((parts, P("pipe")), (inputs, P()), (contexts, P())))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=_everywhere(inputs, P("pipe")), axis_names={"pipe"}, check_vma=False
    )
    return jax.tree.map(lambda y: y[-1], run(parts, inputs, contexts))


class Done(NamedTuple):
    """What a device has at the end of a tick; zeros where the tick was about something else.

    Attributes:
      y: what flows out of the piece.
      dx: gradient of what flowed in.
      own: gradients of the piece's parameters.
      outer: of all others.
      context: of the context.
      scored: loss and scores.
      split: what flows into every layer and the gradient of what flows out, for the weights' gradients later on.
    """

    y: Any
    dx: Any
    own: Any
    outer: Any
    context: Any
    scored: Any
    split: Any


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
    remat: Callable[[Any], Any] = lambda f: f,
    kept: tuple[list[P], list[P]] | None = None,
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
      remat: wraps every layer of a recomputed stage (`jax.checkpoint` with a policy).
      kept: mesh axes of the sums of gradients, of one layer's floating leaves and of outer's; whole by default, and
        with schedules that split gradients.

    Returns:
      (loss, scores, gradients of layers, of outer, of inputs, of the contexts' floating leaves): sums over
      micro-batches, the last two `[M, ...]`.
    """
    p, v = schedule.stages, schedule.chunks
    whole = [None] * len(divide(layers)[0]), [None] * len(divide(outer)[0])
    layer_specs, outer_specs = whole if kept is None or schedule.splits else kept
    table = tables(schedule)
    keeps, keeps_back, keeps_split = slots(schedule, table)
    scored = jax.eval_shape(finish, outer, *(jax.tree.map(lambda x: x[0], t) for t in (inputs, batches)))

    def local(layers: Tree, outer: Tree, inputs: Tree, contexts: Tree, batches: Tree, rows: Mapping[str, Any]) -> Any:
        device = jax.lax.axis_index("pipe")
        layers = jax.tree.map(lambda x: x[0], layers)  # [v, each, ...]
        zeros = lambda tree, dtype=None: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)
        floats = lambda tree: divide(tree)[0]

        stage = Stage(layer, cut, remat)

        def branches(own: Tree, x: Any, dy: Any, split: Any, context: Any, micro: Any, piece: jax.Array) -> list[Any]:
            own_f, own_of = divide(own)
            outer_f, outer_of = divide(outer)
            context_f, context_of = divide(context)
            empty = Done(
                *(zeros(x), zeros(x), zeros(own_f), zeros(outer_f), zeros(context_f)),
                *(zeros(scored), zeros(split)),
            )
            one = jnp.ones((), jnp.float32)

            def forward() -> Done:
                return empty._replace(y=stage(own, x, context, piece))

            def inputs_only() -> Done:
                _, into, pulls = stage.reversible(own, x, context, piece)
                dx, outof = stage.of_inputs(pulls, dy)
                return empty._replace(dx=dx, split=(into, outof))

            def inputs_only_last() -> Done:
                y, into, pulls = stage.reversible(own, x, context, piece)
                loss, pull, scores = jax.vjp(lambda y, out: finish(outer_of(out), y, micro), y, outer_f, has_aux=True)
                dy, d_outer = pull(one)
                dx, outof = stage.of_inputs(pulls, dy)
                return empty._replace(dx=dx, outer=d_outer, scored=(loss, scores), split=(into, outof))

            def weights_only() -> Done:
                d_own, d_context = stage.of_weights(own, *split, context, piece)
                return empty._replace(own=d_own, context=d_context)

            idle = lambda: empty
            return [idle, forward, inputs_only, weights_only, idle, inputs_only_last, weights_only]

        def pin(x: jax.Array, spec: P | None, before: int = 0) -> jax.Array:
            """Divides a sum of gradients as they are kept; the spec is of what follows `before` dimensions."""
            if spec is None:
                return x
            inside = jax.sharding.get_abstract_mesh()
            return jax.lax.with_sharding_constraint(x, NamedSharding(inside, P(*[None] * before, *spec)))

        def turns(
            carried: Any, op: jax.Array, own: Tree, x: Any, dy: Any, context: Any, micro: Any, at: Any, piece: Any
        ) -> tuple[Any, Done]:
            """A tick without W, in loops of no or one turn: what branches return is copied, what loops carry is not.

            Args:
              carried: what flows into every layer, by chunk and place; sums of gradients of layers; of outer.
              op: what this tick is about.
              own: parameters of its piece.
              x: what flows in.
              dy: gradient of what flows out.
              context: of its micro-batch.
              micro: the batch's.
              at: chunk and place.
              piece: number of the piece.

            Returns:
              (`carried` with this tick's, what else there is to say).
            """
            outer_f, outer_of = divide(outer)
            context_f, context_of = divide(context)

            def turn(ops: tuple[int, ...], body: Callable[[Any], Any], start: Any) -> Any:
                often = sum((op == i).astype(jnp.int32) for i in ops)
                with jax.named_scope("turn_" + "_".join(map(str, ops))):
                    return jax.lax.fori_loop(0, often, lambda _, state: body(state), start)

            def forward(state: Any) -> Any:
                def one(state: Any, item: Any) -> Any:
                    x, into = state
                    j, i, own = item
                    into = jax.tree.map(lambda a, b: a.at[(*at, j)].set(b), into, x)
                    return (stage.one(own, i, x, context), into), None

                return jax.lax.scan(one, (x, state[1]), (*layers_here, own))[0]

            def end(state: Any) -> Any:
                _, d_outer, _ = state
                loss, pull, scores = jax.vjp(lambda y, out: finish(outer_of(out), y, micro), y, outer_f, has_aux=True)
                dy, more = pull(jnp.ones((), jnp.float32))
                return dy, add(d_outer, more, outer_specs), (loss, scores)

            def add(total: list[Any], more: list[Any], specs: list[Any]) -> list[Any]:
                return [a + pin(b.astype(a.dtype), s) for a, b, s in zip(total, more, specs, strict=True)]

            def backward(state: Any) -> Any:
                def one(state: Any, item: Any) -> Any:
                    dy, d_layers, d_context = state
                    j, i, own = item
                    own_f, own_of = divide(own)
                    x = jax.tree.map(lambda a: a[(*at, j)], into)
                    through = lambda o, x, c: stage.one(own_of(o), i, x, context_of(c))
                    d_own, dx, more = jax.vjp(through, own_f, x, context_f)[1](dy)
                    d_layers = [
                        a.at[at[0], j].add(pin(g.astype(a.dtype), s))
                        for a, g, s in zip(d_layers, d_own, layer_specs, strict=True)
                    ]
                    return (dx, d_layers, jax.tree.map(jnp.add, d_context, more)), None

                return jax.lax.scan(one, state, (*layers_here, own), reverse=True)[0]

            into, d_layers, d_outer = carried
            layers_here = jnp.arange(cut.each), stage.indices(piece)
            y, into = turn((1, 5), forward, (zeros(x), into))
            dy, d_outer, scores = turn((5,), end, (dy, d_outer, zeros(scored)))
            dx, d_layers, d_context = turn((2, 5), backward, (dy, d_layers, zeros(context_f)))
            return (into, d_layers, d_outer), Done(y, dx, None, None, d_context, scores, ())

        def tick(state: Any, row: Mapping[str, Any]) -> tuple[Any, None]:
            held, back, splits, d_layers, d_outer, d_inputs, d_contexts, total = state
            at = {name: x[device] for name, x in row.items()}
            micro, chunk = at["micro"], at["chunk"]
            entry = (device == 0) & (chunk == 0)
            stored = _pick(_pick(held, chunk), micro % keeps)
            x = jax.tree.map(lambda a, b: jnp.where(entry, a, b), _pick(inputs, micro), stored)
            dy = _pick(_pick(back, chunk), micro % keeps_back)
            own, context, batch = _pick(layers, chunk), _pick(contexts, micro), _pick(batches, micro)
            piece = chunk * p + device
            if schedule.splits:
                split = _pick(_pick(splits, chunk), micro % keeps_split)
                done = jax.lax.switch(at["op"], branches(own, x, dy, split, context, batch, piece))
                d_layers = jax.tree.map(lambda a, b: a.at[chunk].add(b.astype(a.dtype)), d_layers, done.own)
                d_outer = jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_outer, done.outer)
            else:
                place, carried = (chunk, micro % keeps), (splits, d_layers, d_outer)
                carried, done = turns(carried, at["op"], own, x, dy, context, batch, place, piece)
                splits, d_layers, d_outer = carried

            add_at = lambda tree, i, more: jax.tree.map(lambda a, b: a.at[i].add(b.astype(a.dtype)), tree, more)
            d_contexts = add_at(d_contexts, micro, done.context)
            total = jax.tree.map(jnp.add, total, done.scored)
            enters = entry & (at["op"] % 3 == 2)  # a turn that did not happen leaves the dy that it was given
            d_inputs = add_at(d_inputs, micro, jax.tree.map(lambda g: jnp.where(enters, g, 0), done.dx))
            round_ = [(i, (i + 1) % p) for i in range(p)]
            y, dx = _send(done.y, round_), _send(done.dx, [(b, a) for a, b in round_])

            def keep(tree: Tree, new: Tree, name: str, count: int) -> Tree:
                i = at[f"{name}_chunk"], at[f"{name}_micro"] % count
                return jax.tree.map(lambda a, b: a.at[i].set(jnp.where(at[name] > 0, b, a[i])), tree, new)

            held, back = keep(held, y, "get", keeps), keep(back, dx, "back", keeps_back)
            if schedule.splits:
                i, now = (chunk, micro % keeps_split), at["op"] % 3 == 2
                splits = jax.tree.map(lambda a, b: a.at[i].set(jnp.where(now, b, a[i])), splits, done.split)
            return (held, back, splits, d_layers, d_outer, d_inputs, d_contexts, total), None

        one = jax.tree.map(lambda x: x[0], inputs)
        room = lambda count: jax.tree.map(lambda x: jnp.zeros((v, count, *x.shape), x.dtype), one)
        layered = lambda count: jax.tree.map(lambda x: jnp.zeros((v, count, cut.each, *x.shape), x.dtype), one)
        start = (
            room(keeps),
            room(keeps_back),
            (layered(keeps_split), layered(keeps_split)) if schedule.splits else layered(keeps),
            [pin(x, s, 2) for x, s in zip(zeros(floats(layers), jnp.float32), layer_specs, strict=True)],
            [pin(x, s) for x, s in zip(zeros(floats(outer), jnp.float32), outer_specs, strict=True)],
            zeros(inputs),
            zeros(floats(contexts)),
            zeros(scored),
        )
        (*_, d_layers, d_outer, d_inputs, d_contexts, total), _ = jax.lax.scan(tick, start, rows)
        # in float32: XLA:CPU has no sum of bfloat16 where some axes are manual only
        add = lambda x: jax.lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), "pipe").astype(x.dtype)
        together = lambda tree: jax.tree.map(add, tree)
        d_layers = jax.tree.map(lambda x: x[None], d_layers)
        d_inputs = jax.tree.map(lambda x: x[None], d_inputs)  # the first device's are the ones
        return together(total), d_layers, together(d_outer), d_inputs, together(d_contexts)

    spread, alike = (lambda tree, spec=spec: _everywhere(tree, spec) for spec in (P("pipe"), P()))
    layers_f, layers_of = divide(layers)
    outer_f, outer_of = divide(outer)
    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    rows = {name: jnp.asarray(x) for name, x in table.items()}
    arguments = (parts, outer, inputs, contexts, batches, rows)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spread(parts), *(alike(a) for a in arguments[1:])),
        out_specs=(alike(scored), spread(layers_f), alike(outer_f), spread(inputs), alike(divide(contexts)[0])),
        axis_names={"pipe"},
        check_vma=False,
    )
    (loss, scores), d_layers, d_outer, d_inputs, d_contexts = run(*arguments)
    d_inputs = jax.tree.map(lambda x: x[0], d_inputs)
    return loss, scores, layers_of([cut.whole(g) for g in d_layers]), outer_of(d_outer), d_inputs, d_contexts
