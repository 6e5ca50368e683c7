"""Pipeline parallelism: one interpreter for every schedule, for any model whose layers are one stack.

A model is taken apart without its knowing: `nn.Stack` hands its layers to a runner, which collects what flows in (one
pass of `apply`, the embedding's part of the model) or puts in what flows out (another, the head's part). Between them
the interpreter runs the schedule's table, tick by tick, in `shard_map` over the mesh axis `pipe`; the other axes stay
automatic, so tensor parallelism and ZeRO continue inside a stage.

A stage keeps what flows into its layers and computes each again in the backward, whose gradients are summed in place,
layer by layer, divided as ZeRO keeps them. What a tick computes sums over `model` and `data` among devices that are at
the same turn, and gathers over `data` what ZeRO-3 divides, a layer at a time; it reshards nothing else.

Beside what a schedule holds, every stage has the whole batch's inputs of the first layer and their gradients.

Sources: see `schedules`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llm_jax.nn.protocols import Batch, Params, Tree
from llm_jax.nn.stack import Call
from llm_jax.parallel.pipeline.cut import Cut, Layer, divide, is_float, pick, pin, send
from llm_jax.parallel.pipeline.schedules import Schedule, tables
from llm_jax.parallel.pipeline.stage import Finish, Micros, Row, Stage


class PipelineError(ValueError):
    """A model that cannot be cut into stages; one line that says why."""


def stacks(params: Params) -> dict[tuple[str, ...], Params]:
    """Every stack's parameters by its path.

    Raises:
      PipelineError: if there is none, layers are unstacked, or some have parameters of their own.
    """
    found: dict[tuple[str, ...], Params] = {}

    def visit(tree: Tree, path: tuple[str, ...]) -> None:
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                if key == "per_layer":
                    raise PipelineError("plan.pipe: layers with parameters of their own (per_layer) are not stages")
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


def put(params: Params, layers: Mapping[tuple[str, ...], Tree]) -> Params:
    """`params` with other layers in the stacks at these paths."""
    for path, value in layers.items():
        params = _put(params, (*path, "layers"), value)
    return params


def _put(params: Tree, path: tuple[str, ...], value: Tree) -> Tree:
    return value if not path else {**params, path[0]: _put(params[path[0]], path[1:], value)}


def taking(calls: list[Call], results: Sequence[Tree] = ()) -> Callable[[Call], tuple[Tree, Tree]]:
    """A stack runner that runs nothing: gives the first stacks their results, collects the calls of the others."""
    left = list(results)

    def run(call: Call) -> tuple[Tree, Tree]:
        if call.per_layer is not None:
            raise PipelineError("plan.pipe: a cache or memories have no place in a pipeline")
        if left:
            return left.pop(0), unusable_outputs(call)
        calls.append(call)
        return call.carry, unusable_outputs(call)

    return run


def unusable_outputs(call: Call) -> tuple[Tree, ...] | None:
    """What the layers would return beside the carry, filled with not-a-number, so that nobody can use it."""
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), call.params)
    shapes = jax.eval_shape(lambda p, c, s: call.layer(p, 0, c, None, s)[1], layer, call.carry, call.context)
    if shapes is None:
        return None
    bad = lambda x: jnp.full(x.shape, jnp.nan if is_float(x) else 0, x.dtype)
    return tuple(jax.tree.map(bad, shapes) for _ in call.group_of)


def _spread(tree: Tree, spec: P) -> Tree:
    """The same mesh axes for every leaf."""
    return jax.tree.map(lambda _: spec, tree)


def _wide(x: jax.Array) -> jax.Array:
    """Floats in float32 at least: XLA:CPU has no sum of bfloat16 where some axes are manual only."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float(x) else x


def _count(layers: Params) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _keep(layer: Callable[..., Any]) -> Callable[..., Any]:
    return layer


def forward(
    mesh: Mesh,
    layer: Layer,
    layers: Params,
    inputs: Tree,
    contexts: Tree,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = _keep,
) -> Tree:
    """GPipe's forward of one stack, whose backward is autodiff's: for models of several stacks.

    Args:
      mesh: with the axis `pipe`, along which the layers are cut.
      layer: runs one layer.
      layers: stacked, `[L, ...]`.
      inputs: what flows into the first layer, `[M, ...]`.
      contexts: what all layers of a micro-batch see, `[M, ...]`.
      remat: wraps every layer (`jax.checkpoint` with a policy).

    Returns:
      What flows out of the last layer, `[M, ...]`.
    """
    p, micros = mesh.shape["pipe"], _count(inputs)
    cut = Cut(_count(layers), p)
    padded, given = cut.padded(layer), (inputs, contexts)

    def local(parts: Params, inputs: Tree, contexts: Tree) -> Tree:
        device = jax.lax.axis_index("pipe")
        inputs, contexts = jax.tree.map(lambda x, of: x.astype(of.dtype), (inputs, contexts), given)
        stage, numbers = pick(parts, 0, 0), device * cut.each + jnp.arange(cut.each)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def run(stage: Params, x: Tree, context: Tree) -> Tree:
            step = remat(lambda x, item: (padded(*item, x, context), None))
            return jax.lax.scan(step, x, (stage, numbers))[0]

        def tick(state: Tree, t: jax.Array) -> tuple[Tree, Tree]:
            micro = jnp.clip(t - device, 0, micros - 1)
            x = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), pick(inputs, micro), state)
            y = run(stage, x, pick(contexts, micro))
            return send(y, [(i, i + 1) for i in range(p - 1)]), y

        start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), inputs)
        _, out = jax.lax.scan(tick, start, jnp.arange(micros + p - 1))
        return jax.tree.map(lambda y: y[None, p - 1 :], out)  # where the last device has them

    inputs, contexts = jax.tree.map(_wide, given)  # their gradients are summed over `pipe`
    parts = jax.tree.map(lambda x: cut.pieces_of(x, p), layers)
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_spread(parts, P("pipe")), _spread(inputs, P()), _spread(contexts, P())),
        out_specs=_spread(inputs, P("pipe")),
        axis_names={"pipe"},
        check_vma=False,
    )
    return jax.tree.map(lambda y: y[-1], run(parts, inputs, contexts))


class Gradients(NamedTuple):
    """Sums over all micro-batches.

    Attributes:
      loss: the loss.
      scores: what `finish` returns beside the loss.
      layers: gradients of the layers.
      outer: gradients of all other parameters.
      inputs: gradients of what flows into the first layer, `[M, ...]`.
      contexts: gradients of the contexts' floating leaves, `[M, ...]`.
    """

    loss: jax.Array
    scores: dict[str, jax.Array]
    layers: Tree
    outer: Tree
    inputs: Tree
    contexts: list[jax.Array]


def run(
    schedule: Schedule,
    mesh: Mesh,
    layer: Layer,
    finish: Finish,
    layers: Params,
    outer: Params,
    inputs: Tree,
    contexts: Tree,
    batches: Batch,
    gradients: tuple[Sequence[P | None], Sequence[P | None]] | None = None,
    stored: Sequence[P] | None = None,
) -> Gradients:
    """Runs a schedule: losses and gradients of all micro-batches.

    Args:
      schedule: what happens when.
      mesh: with the axis `pipe`.
      layer: `(params of one layer, its index, carry, context) -> carry`.
      finish: `(outer, carry, micro-batch) -> (loss, scores)`: the head and the objective.
      layers: stacked, `[L, ...]`, floating leaves differentiated.
      outer: all other parameters, floating leaves differentiated.
      inputs: what flows into the first layer, `[M, ...]`.
      contexts: what all layers of a micro-batch see, `[M, ...]`.
      batches: what `finish` needs, `[M, ...]`.
      gradients: mesh axes of the sums of gradients, of one layer's floating leaves and of outer's; whole by default.
      stored: mesh axes that one layer's parameters are divided over, by leaves; `layer` gathers them.
    """
    p = schedule.stages
    cut = Cut(_count(layers), p * schedule.chunks)
    (layers_f, layers_of), (outer_f, outer_of) = divide(layers), divide(outer)
    layer_specs, outer_specs = gradients or ([None] * len(layers_f), [None] * len(outer_f))
    scored = jax.eval_shape(finish, outer, pick(inputs, 0), pick(batches, 0))

    def local(parts: Params, outer: Params, micros: Micros, rows: Row) -> Gradients:
        leaves, form = jax.tree.flatten(pick(parts, 0))
        specs: Sequence[P | None] = stored or [None] * len(leaves)
        pinned = jax.tree.unflatten(form, [pin(x, spec, 2) for x, spec in zip(leaves, specs, strict=True)])
        stage = Stage(schedule, cut, cut.padded(layer), finish, pinned, outer, micros, layer_specs, outer_specs)
        end, _ = jax.lax.scan(stage.tick, stage.start(scored), rows)

        def together(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: jax.lax.psum(_wide(x), "pipe").astype(x.dtype), tree)

        return Gradients(
            *together(end.scored),
            layers=[x[None] for x in end.d_layers],
            outer=together(end.d_outer),
            inputs=jax.tree.map(lambda x: x[None], end.d_inputs),
            contexts=together(end.d_contexts),
        )

    parts, micros = jax.tree.map(lambda x: cut.pieces_of(x, p), layers), Micros(inputs, contexts, batches)
    rows = {name: jnp.asarray(x) for name, x in tables(schedule).items()}
    found = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_spread(parts, P("pipe")), _spread(outer, P()), _spread(micros, P()), _spread(rows, P())),
        out_specs=Gradients(
            *_spread(scored, P()),
            layers=_spread(layers_f, P("pipe")),
            outer=_spread(outer_f, P()),
            inputs=_spread(inputs, P("pipe")),
            contexts=_spread(divide(contexts)[0], P()),
        ),
        axis_names={"pipe"},
        check_vma=False,
    )(parts, outer, micros, rows)
    return found._replace(
        layers=layers_of([cut.whole(g) for g in found.layers]),
        outer=outer_of(found.outer),
        inputs=jax.tree.map(lambda x: x[0], found.inputs),  # the first device has them
    )
