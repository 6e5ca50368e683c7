"""The gradient of a step whose layers are stages of a pipeline: the model taken apart, run, put together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.nn.protocols import Model, Params, Tree
from llm_jax.nn.stack import Call
from llm_jax.objectives.objective import Objective, Prepared, total_loss
from llm_jax.parallel import explicit
from llm_jax.parallel.pipeline import interpreter
from llm_jax.parallel.pipeline.cut import is_float
from llm_jax.parallel.pipeline.schedules import Schedule
from llm_jax.parallel.step_plan import Pipe

Scored = tuple[jax.Array, dict[str, jax.Array]]  # the loss, and sums of every term
Micro = tuple[Prepared, jax.Array]  # a micro-batch and its dropout key


class _Parts:
    """A model around its stacks.

    Attributes:
      layers: the stacks' parameters by path.
      outer: all others.
      remat: what a stage's layers are wrapped in.
    """

    def __init__(self, model: Any, loss_of: Callable[[Any, Prepared], Scored], params: Any) -> None:
        self.model, self.loss_of = model, loss_of
        self.layers = interpreter.stacks(params)
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.shapes = {path: jax.tree.map(shape, layers) for path, layers in self.layers.items()}
        self.outer = interpreter.put(params, dict.fromkeys(self.layers))
        self.calls: list[Call] = []
        run, policy = model.execution.remat_every(), model.execution.remat_policy()
        self.remat = lambda f: jax.checkpoint(f, policy=policy, prevent_cse=False) if run else f

    def _apply(self, outer: Any, micro: Micro, results: Sequence[Any]) -> Any:
        self.calls.clear()
        runner = interpreter.taking(self.calls, results)
        model = self.model.clone(execution=dataclasses.replace(self.model.execution, stack_runner=runner))
        variables = {"params": interpreter.put(outer, self.shapes)}
        return model.apply(variables, **micro[0].inputs, train=True, rngs={"dropout": micro[1]})

    def begin(self, outer: Any, micro: Micro, results: Sequence[Any] = ()) -> tuple[Any, Any]:
        """(carry, context) of the stack that follows those with results; `calls[0]` is its call."""
        self._apply(outer, micro, results)
        if not self.calls:
            raise interpreter.PipelineError("plan.pipe: the model runs fewer stacks than it has parameters of")
        return self.calls[0].carry, self.calls[0].context

    def stage(self) -> tuple[Callable[..., Any], Any, jax.Array]:
        """(layer, parameters for every layer, which stored layer each has) of the call that `begin` recorded."""
        call = self.calls[0]
        group_of, layers = jnp.asarray(call.group_of), self.layers[call.path]
        if len(group_of) != jax.tree.leaves(layers)[0].shape[0]:  # shared: each stage has those of its layers
            layers = jax.tree.map(lambda x: x[group_of], layers)
        return lambda p, i, x, context: call.layer(p, i, x, None, context)[0], layers, group_of

    def finish(self, outer: Any, results: Sequence[Any], micro: Micro) -> Scored:
        """The loss after the last stack."""
        return self.loss_of(self._apply(outer, micro, results), micro[0])


def _leaves(specs: Any) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


def _of_layer(specs: Any, path: tuple[str, ...]) -> list[P]:
    """Mesh axes of every leaf of one layer."""
    return [P(*spec[1:]) for spec in _leaves(interpreter.stacks(specs)[path])]


def _floating(specs: Sequence[P], tree: Any) -> list[P]:
    return [spec for spec, x in zip(specs, jax.tree.leaves(tree), strict=True) if is_float(x)]


def _run_schedule(parts: _Parts, micros: Any, pipe: Pipe) -> tuple[Scored, Any]:
    """One stack, any schedule: (scored, gradients of all parameters)."""
    mesh, schedule, division = pipe
    outer_f, outer_of = interpreter.divide(parts.outer)

    def begin(outer_f: list[jax.Array]) -> tuple[list[jax.Array], Any]:
        both = jax.vmap(parts.begin, (None, 0))(outer_of(outer_f), micros)
        return interpreter.divide(both)[0], both

    _, pull, (inputs, contexts) = jax.vjp(begin, outer_f, has_aux=True)
    layer, layers, group_of = parts.stage()
    ((path, groups),) = parts.layers.items()
    finish = lambda outer, carry, micro: parts.finish(outer, [carry], micro)
    computing, stored, divided = (specs and _of_layer(specs, path) for specs in division)
    if stored and computing:
        given, gathers = layer, explicit.gathering_layer(mesh, stored, computing)
        layer = lambda p, *rest: given(gathers(p), *rest)
    outer = division.gradients and _leaves(interpreter.put(division.gradients, dict.fromkeys(parts.layers)))
    loss, scores, d_layers, d_outer, d_inputs, d_contexts = interpreter.run(
        schedule,
        mesh,
        layer,
        finish,
        layers,
        parts.outer,
        inputs,
        contexts,
        micros,
        gradients=(_floating(divided, groups), _floating(outer, parts.outer)) if divided and outer else None,
        stored=stored,
    )
    if layers is not groups:
        d_layers = jax.tree.map(lambda g, x: jnp.zeros(x.shape, g.dtype).at[group_of].add(g), d_layers, groups)
    (d_begin,) = pull([*interpreter.divide(d_inputs)[0], *d_contexts])
    summed = [a + b.astype(a.dtype) for a, b in zip(interpreter.divide(d_outer)[0], d_begin, strict=True)]
    return (loss, scores), interpreter.put(outer_of(summed), {path: d_layers})


def _run_in_sequence(parts: _Parts, micros: Any, mesh: Mesh, stages: int) -> Scored:
    """Several stacks, one pipeline after the other, differentiable: GPipe."""
    results: list[Any] = []
    for _ in parts.layers:
        begin = lambda micro, results: parts.begin(parts.outer, micro, results)
        inputs, contexts = jax.vmap(begin)(micros, results)
        layer, layers, _ = parts.stage()
        results.append(interpreter.forward(mesh, layer, layers, inputs, contexts, parts.remat))
    if jax.tree.leaves(results[-1])[0].shape[0] % stages == 0:  # the head's work is shared out over the stages
        spread = NamedSharding(mesh, P("pipe", ("replica", "data")))
        results[-1] = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spread), results[-1])
    scored = jax.vmap(lambda results, micro: parts.finish(parts.outer, results, micro))(results, micros)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), scored)


def check_stages(params: Any, schedule: Schedule, carry: bool = False) -> None:
    """Refuses what cannot be cut into stages.

    Args:
      params: of the model, abstract will do.
      schedule: what should run.
      carry: whether something runs on from batch to batch.

    Raises:
      PipelineError: with what to do.
    """
    if carry:
        raise interpreter.PipelineError(
            "plan.pipe: what runs on from batch to batch (objective.carry) has no place in it"
        )
    found = interpreter.stacks(params)
    if len(found) > 1 and schedule.name != "gpipe":
        raise interpreter.PipelineError(
            f"plan.schedule={schedule.name} needs one stack of layers, the model has {len(found)} "
            f"({', '.join('/'.join(path) for path in found)}): set plan.schedule=gpipe"
        )


def make_gradient(
    model: Model, objective: Objective, pipe: Pipe, compute: Callable[[Params], Params]
) -> Callable[..., tuple[Scored, Params]]:
    """Builds `(trainable, prepared, totals, keys, scale) -> ((loss, scores), gradients)`.

    Equal to accumulation over the same micro-batches with the same keys.

    Args:
      model: a module that `check_stages` lets pass.
      objective: see `objectives.objective`.
      pipe: the pipeline; what its division leaves undivided between turns is gathered once a step.
      compute: the parameters that compute, from those that train.
    """
    mesh, schedule, (computing, stored, divided) = pipe

    def pinned(tree: Tree, specs: Tree) -> Tree:
        pin = lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return tree if specs is None else jax.tree.map(pin, tree, specs)

    def gradient(
        trainable: Params, prepared: Prepared, totals: dict[str, jax.Array], keys: jax.Array, scale: float | jax.Array
    ) -> tuple[Scored, Params]:
        def loss_of(output: Any, micro: Prepared) -> Scored:
            scores = objective.score(output, micro.targets)
            return total_loss(objective, scores, totals) * scale, scores

        leaves, pull = jax.vjp(lambda trainable: interpreter.divide(compute(trainable))[0], trainable)
        join, micros = interpreter.divide(compute(trainable))[1], (prepared, keys)
        params = join(leaves)
        if len(interpreter.stacks(params)) == 1:
            parts = _Parts(model, loss_of, pinned(params, computing if stored is None else stored))
            scored, grads = _run_schedule(parts, micros, pipe)
            found = interpreter.divide(pinned(grads, computing) if divided is None else grads)[0]  # else a tick divides
        else:
            whole_parts = lambda f: _Parts(model, loss_of, pinned(join(f), computing))
            loss = lambda f: _run_in_sequence(whole_parts(f), micros, mesh, schedule.stages)
            scored, found = jax.value_and_grad(loss, has_aux=True)(leaves)
        (grads,) = pull([g.astype(x.dtype) for g, x in zip(found, leaves, strict=True)])
        return scored, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return gradient
