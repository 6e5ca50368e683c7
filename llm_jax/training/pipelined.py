"""The gradient of a step whose layers are stages of a pipeline: the model taken apart, run, put together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.nn.ties import Ties, expand
from llm_jax.objectives.objective import Objective, Prepared, total_loss
from llm_jax.parallel import pipeline
from llm_jax.parallel.schedules import Schedule

Gradient = Callable[..., tuple[tuple[jax.Array, dict[str, jax.Array]], Any]]


def make_gradient(
    model: Any,
    objective: Objective,
    mesh: Mesh,
    schedule: Schedule,
    form: Callable[[Any], Any],
    ties: Ties | None = None,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Gradient:
    """Builds `(trainable, prepared, totals, keys, scale) -> ((loss, scores), gradients)`.

    Equal to accumulation over the same micro-batches with the same keys.

    Args:
      model: a module whose layers are one stack.
      objective: see `objectives.objective`.
      mesh: with the axis `pipe`.
      schedule: what happens when.
      form: the parameters that compute, of those that train (joined with what is frozen, cast).
      ties: shared parameters.
      gather: undoes ZeRO's division of the parameters, once a step: a tick's branches must not.
    """

    def running(runner: Any) -> Any:
        return model.clone(execution=dataclasses.replace(model.execution, stack_runner=runner))

    def gradient(
        trainable: Any, prepared: Prepared, totals: Mapping[str, jax.Array], keys: jax.Array, scale: Any
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        def floats(trainable: Any) -> list[jax.Array]:
            params = form(trainable)
            return pipeline.divide(expand(params, ties) if ties else params)[0]

        params = form(trainable)
        params = expand(params, ties) if ties else params
        _, join = pipeline.divide(params)
        leaves, pull = jax.vjp(floats, trainable)
        params = gather(join(leaves))
        layers, path = pipeline.split_layers(params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), layers)
        outer = pipeline.put(params, path, None)
        kept: list[Any] = []

        def apply(outer: Any, micro: tuple[Prepared, jax.Array], runner: Any) -> Any:
            params = pipeline.put(outer, path, shapes)
            rngs = {"dropout": micro[1]}
            return running(runner).apply({"params": params}, **micro[0].inputs, train=True, rngs=rngs)

        def begin(outer: Any, micro: tuple[Prepared, jax.Array]) -> tuple[Any, Any]:
            kept.clear()
            apply(outer, micro, pipeline.taking(kept))
            return kept[0][1:]

        def finish(outer: Any, carry: Any, micro: tuple[Prepared, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            scores = objective.score(apply(outer, micro, pipeline.giving(carry)), micro[0].targets)
            return total_loss(objective, scores, totals) * scale, scores

        outer_f, outer_of = pipeline.divide(outer)
        micros = (prepared, keys)

        def begin_floats(outer_f: list[jax.Array]) -> tuple[list[jax.Array], Any]:
            both = jax.vmap(begin, (None, 0))(outer_of(outer_f), micros)
            return pipeline.divide(both)[0], both

        _, pull_begin, (inputs, contexts) = jax.vjp(begin_floats, outer_f, has_aux=True)
        layer = kept[0][0]
        count = jax.tree.leaves(layers)[0].shape[0]
        cut = pipeline.Cut(count, schedule.stages * schedule.chunks)
        loss, scores, d_layers, d_outer, d_inputs, d_contexts = pipeline.run(
            *(schedule, mesh, cut, lambda p, i, x, c: layer(p, i, x, None, c)[0], finish),
            *(layers, outer, inputs, contexts, micros),
        )
        d_inputs = pipeline.divide(d_inputs)[0]
        (d_begin,) = pull_begin([*d_inputs, *d_contexts])
        summed = [a + b.astype(a.dtype) for a, b in zip(pipeline.divide(d_outer)[0], d_begin, strict=True)]
        whole = pipeline.divide(pipeline.put(outer_of(summed), path, d_layers))[0]
        (grads,) = pull([g.astype(x.dtype) for g, x in zip(whole, leaves, strict=True)])
        return (loss, scores), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return gradient
