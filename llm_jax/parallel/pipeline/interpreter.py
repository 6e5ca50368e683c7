"""Pipeline parallelism: one interpreter for every schedule, for any model whose layers are one stack.

A model is taken apart without its knowing: `nn.Stack` hands its layers to a runner, which keeps what flows in (one pass
of `apply`, the embedding's part of the model) or puts in what flows out (another, the head's part). Between them the
interpreter runs the schedule's table, tick by tick, in `shard_map` over the mesh axis `pipe`; the other axes stay
automatic, so tensor parallelism and ZeRO go on inside a stage.

A stage keeps what flows into its layers and computes each again in the backward, whose gradients are summed in place,
layer by layer, divided as ZeRO keeps them. A tick is four loops of no or one turn: what branches return is copied, what
loops carry is not. Every tick ends with one permutation of activations to the next device and one of their gradients to
the previous one. What a tick computes sums over `model` and `data` among devices that are at the same, and gathers over
`data` what ZeRO-3 divides, a layer at a time; it reshards nothing else.

Beside what a schedule holds, every stage has the whole batch's inputs of the first layer and their gradients.

Sources: see `schedules`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn.stack import Call
from llm_jax.parallel.pipeline.schedules import KINDS, Schedule, slots, tables
from llm_jax.parallel.pipeline.stage import (
    Cut,
    Stage,
    divide,
    is_float,
    pick,
    pin,
    pin_gradient,
    put_at,
    zeros,
)

Tree = Any


class PipelineError(ValueError):
    """A model that cannot be cut into stages; one line that says why."""


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


def _send(tree: Tree, pairs: list[tuple[int, int]]) -> Tree:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "pipe", pairs), tree)


def _everywhere(tree: Tree, spec: P) -> Tree:
    return jax.tree.map(lambda _: spec, tree)


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
        own, numbers = pick(parts, 0, 0), device * cut.each + jnp.arange(cut.each)
        stage = Stage(cut, layer, own, [])

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def run(own: Tree, x: Any, context: Any) -> Any:
            one = remat(lambda x, item: (stage.one(*item, x, context), None))
            return jax.lax.scan(one, x, (own, numbers))[0]

        def tick(state: Any, t: jax.Array) -> tuple[Any, Any]:
            micro = jnp.clip(t - device, 0, micros - 1)
            x = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), pick(inputs, micro), state)
            y = run(own, x, pick(contexts, micro))
            pairs = [(i, i + 1) for i in range(p - 1)]
            return _send(y, pairs), y

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), inputs)
        _, out = jax.lax.scan(tick, start, jnp.arange(micros + p - 1))
        return jax.tree.map(lambda y: y[None, p - 1 :], out)  # where the last device has them

    # their gradients are summed over `pipe`, in float32: XLA:CPU has no sum of bfloat16 where some axes are manual only
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float(x) else x
    inputs, contexts = jax.tree.map(wide, given)
    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    specs = tuple(_everywhere(*a) for a in ((parts, P("pipe")), (inputs, P()), (contexts, P())))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=_everywhere(inputs, P("pipe")), axis_names={"pipe"}, check_vma=False
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
    kept: tuple[list[P], list[P]] | None = None,
    held: list[P] | None = None,
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
      kept: mesh axes of the sums of gradients, of one layer's floating leaves and of outer's; whole by default.
      held: mesh axes that one layer's parameters are divided over, by leaves; `layer` gathers them.

    Returns:
      (loss, scores, gradients of layers, of outer, of inputs, of the contexts' floating leaves): sums over
      micro-batches, the last two `[M, ...]`.
    """
    p, v = schedule.stages, schedule.chunks
    whole = [None] * len(divide(layers)[0]), [None] * len(divide(outer)[0])
    layer_specs, outer_specs = whole if kept is None else kept
    table, places = tables(schedule), slots(schedule)
    scored = jax.eval_shape(finish, outer, pick(inputs, 0), pick(batches, 0))

    def local(layers: Tree, outer: Tree, inputs: Tree, contexts: Tree, batches: Tree, rows: Mapping[str, Any]) -> Any:
        device = jax.lax.axis_index("pipe")
        leaves, form = jax.tree.flatten(pick(layers, 0))
        lie = [None] * len(leaves) if held is None else held
        own = jax.tree.unflatten(form, [pin(x, spec, 2) for x, spec in zip(leaves, lie, strict=True)])
        stage = Stage(cut, layer, own, layer_specs)
        outer_f, outer_of = divide(outer)

        def end(state: Any, batch: Any) -> Any:
            """The head and the objective, forward and back, of what flows out of the last layer."""
            y, d_outer, total = state
            loss, pull, scores = jax.vjp(lambda y, out: finish(outer_of(out), y, batch), y, outer_f, has_aux=True)
            dy, more = pull(jnp.ones((), jnp.float32))
            pairs = zip(d_outer, more, outer_specs, strict=True)
            d_outer = [a + pin_gradient(g.astype(a.dtype), spec) for a, g, spec in pairs]
            return dy, d_outer, jax.tree.map(jnp.add, total, (loss, scores))

        def by_rows(tree: Tree) -> Tree:
            """Divides activations by rows, between turns: inside one not all devices would reshard them."""
            return jax.tree.map(lambda x: pin(x, P(("replica", "data"))), tree)

        def tick(state: Any, row: Mapping[str, Any]) -> tuple[Any, None]:
            held, into, back, outof, sums, d_outer, d_inputs, d_contexts, total = state
            at = {name: x[device] for name, x in row.items()}
            piece = lambda kind: at[f"{kind}_chunk"] * p + device
            place = lambda kind, count: (at[f"{kind}_chunk"], at[f"{kind}_micro"] % count)
            of = lambda tree, kind: pick(tree, at[f"{kind}_micro"])
            context = {kind: of(contexts, kind) for kind in KINDS}

            def turn(name: str, body: Callable[[Any], Any], start: Any) -> Any:
                with jax.named_scope(f"turn_{name}"):
                    return jax.lax.fori_loop(0, at[name], lambda _, state: body(state), start)

            def keep(tree: Tree, new: Tree, where: str, name: str, count: int) -> Tree:
                chunk, i = place(name, count)
                return put_at(tree, new, chunk, jnp.where(at[where] > 0, i, count))  # or where nobody looks

            stored, first = pick(held, *place("F", places.inputs)), piece("F") == 0
            x = jax.tree.map(lambda a, b: jnp.where(first, a, b), of(inputs, "F"), stored)
            here = place("F", places.layers)
            y, into = turn("F", lambda s: stage.forward(piece("F"), s[0], context["F"], s[1], here), (by_rows(x), into))

            back = keep(back, by_rows(y), "top", "F", places.back)
            dy = by_rows(pick(back, *place("B", places.back)))
            batch = of(batches, "B")
            dy, d_outer, total = turn("end", lambda s: end(s, batch), (dy, d_outer, total))

            here, none = place("B", places.layers), zeros(divide(context["B"])[0])
            if schedule.splits:
                to = place("B", places.split)
                go = lambda s: stage.backward_inputs(piece("B"), s[0], context["B"], into, here, s[2], to)
                dx, d_context, outof = turn("B", go, (dy, none, outof))
                at_w = place("W", places.layers), outof, place("W", places.split)
                sums = turn("W", lambda s: stage.weights(piece("W"), context["W"], into, *at_w, s), sums)
            else:
                go = lambda s: stage.backward(piece("B"), s[0], context["B"], into, here, s[2])
                dx, d_context, sums = turn("B", go, (dy, none, sums))

            add_at = lambda tree, i, more: jax.tree.map(lambda a, b: a.at[i].add(b.astype(a.dtype)), tree, more)
            d_contexts = add_at(d_contexts, at["B_micro"], d_context)
            enters = (piece("B") == 0) & (at["B"] > 0)  # a turn that did not happen leaves the dy that it was given
            d_inputs = add_at(d_inputs, at["B_micro"], jax.tree.map(lambda g: jnp.where(enters, g, 0), dx))
            round_ = [(i, (i + 1) % p) for i in range(p)]
            y, dx = _send(by_rows(y), round_), _send(by_rows(dx), [(b, a) for a, b in round_])
            held, back = keep(held, y, "get", "get", places.inputs), keep(back, dx, "back", "back", places.back)
            return (held, into, back, outof, sums, d_outer, d_inputs, d_contexts, total), None

        room = lambda *sizes: jax.tree.map(lambda x: jnp.zeros((v, *sizes, *x.shape[1:]), x.dtype), inputs)
        start = (
            room(places.inputs + 1),
            room(places.layers, cut.each),
            room(places.back + 1),
            room(places.split, cut.each) if schedule.splits else (),
            stage.sums(),
            [pin(x, s) for x, s in zip(zeros(outer_f, jnp.float32), outer_specs, strict=True)],
            zeros(inputs),
            zeros(divide(contexts)[0]),
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
