"""Model FLOPs of a step, counted from its program, and the peaks that they are compared with."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from llm_jax.nn import paths
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Params, Tree
from llm_jax.nn.realized import realize
from llm_jax.nn.ties import Ties, expand
from llm_jax.objectives.objective import Objective
from llm_jax.parallel.chips import chip_of
from llm_jax.training.trainable import partition

PLAIN = Execution(attention="reference")  # recomputes nothing, and has no kernels whose insides are hidden


class Flops(NamedTuple):
    """FLOPs of the matrix products and convolutions in a program.

    Attributes:
      forward: of the forward pass.
      total: of forward and backward pass, without recomputation.
      attention: the part of `total` in products of two activations.
    """

    forward: float = 0.0
    total: float = 0.0
    attention: float = 0.0

    def useful(self, causal: bool) -> float:
        """The total, with half of attention's products where a position sees only those before it."""
        return self.total - 0.5 * self.attention * causal

    def plus(self, other: "Flops", times: int = 1) -> "Flops":
        """Adds `times` times another count."""
        return Flops(*(a + times * b for a, b in zip(self, other, strict=True)))


class Origin(NamedTuple):
    """What an array is computed from.

    Attributes:
      learns: something that trains, so its gradient is computed.
      reads: the batch, so it is an activation.
    """

    learns: bool = False
    reads: bool = False


def of_step(
    model: Any,
    objective: Objective,
    params: Params,
    batch: Mapping[str, Any],
    trainable: Sequence[str] | None = None,
    ties: Ties = types.MappingProxyType({}),
) -> Flops:
    """Model FLOPs of one training step.

    A product of a by b costs 2 FLOPs a multiplication forward, as much again for the gradient of `a` and as much again
    for that of `b`, each where it is needed: 6 a parameter and token where everything trains, 4 in a frozen base under
    LoRA (2 below its first trained layer), and a layer that runs twice counts twice. Attention counts whole rows of
    scores, causal or not (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B). Padding is computed and
    counts; recomputation, norms and activations do not. Loops of unknown length count one turn.

    Args:
      model: its config.
      objective: as it trains (`for_run`).
      params: abstract or real.
      batch: abstract or real, all rows of the step.
      trainable: patterns of what trains; None for everything.
      ties: shared parameters, which `params` holds once.
    """
    module = model.make(PLAIN)
    rows = jax.tree.leaves(batch)[0].shape[0]
    carry = jax.eval_shape(lambda: model.init_carry(rows)) if objective.carry else None

    def loss(params: Params, batch: Any, carry: Tree) -> dict[str, jax.Array]:
        prepared = objective.prepare(batch, jax.random.key(0))
        inputs = prepared.inputs if carry is None else {**prepared.inputs, "cache": carry}
        out = module.apply({"params": expand(realize(params), ties)}, **inputs)
        return objective.score(out, prepared.targets)

    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    args = abstract((params, dict(batch), carry))
    trains = {path for path, _ in paths.flatten(partition(args[0], trainable)[0])}
    origins = [Origin(learns=path in trains) for path, _ in paths.flatten(args[0])]
    origins += [Origin(reads=True)] * (len(jax.tree.leaves(args)) - len(origins))
    return _count(loss, args, origins)


def of_forward(fn: Callable[[Any, Any], Any], params: Any, inputs: Any) -> Flops:
    """FLOPs of `fn(params, inputs)`, arguments abstract or real, without a backward pass."""
    origins = [Origin()] * len(jax.tree.leaves(params)) + [Origin(reads=True)] * len(jax.tree.leaves(inputs))
    return _count(fn, (params, inputs), origins)


def _count(fn: Callable[..., Any], args: tuple[Any, ...], origins: Sequence[Origin]) -> Flops:
    traced = jax.make_jaxpr(fn)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars), instantiate=True)  # no logits nobody reads
    return _walk(used, origins)[1]


def _union(origins: Sequence[Origin]) -> Origin:
    return Origin(any(o.learns for o in origins), any(o.reads for o in origins))


def _product(eqn: Any, origins: Sequence[Origin]) -> Flops:
    a, b = (v.aval.shape for v in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        (over, _), _ = eqn.params["dimension_numbers"]
        inner = math.prod(a[d] for d in over)
    else:  # of a convolution's kernel every number but the output's channel
        inner = math.prod(b) // b[eqn.params["dimension_numbers"].rhs_spec[0]]
    forward = 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner
    total = forward * (1 + origins[0].learns + origins[1].learns)
    return Flops(forward, total, total if origins[0].reads and origins[1].reads else 0.0)


def _inner(eqn: Any) -> list[Any]:
    """The programs nested in an equation."""
    found = [x for value in eqn.params.values() for x in (value if isinstance(value, (tuple, list)) else [value])]
    opened = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in found]
    return [x for x in opened if isinstance(x, core.Jaxpr)]


def _loop(body: Any, origins: Sequence[Origin], consts: int, carried: int) -> tuple[list[Origin], Flops]:
    """One turn of a loop, whose carry becomes what any turn makes of it."""
    state = list(origins)
    while True:
        outs, flops = _walk(body, state)
        after = [_union(pair) for pair in zip(state[consts : consts + carried], outs[:carried], strict=True)]
        if after == state[consts : consts + carried]:
            return outs, flops
        state[consts : consts + carried] = after


def _equation(eqn: Any, origins: list[Origin]) -> tuple[list[Origin], Flops]:
    name, params = eqn.primitive.name, eqn.params
    everywhere = [_union(origins)] * len(eqn.outvars)
    if name in ("dot_general", "conv_general_dilated"):
        return everywhere, _product(eqn, origins)
    if name == "scan":
        outs, flops = _loop(params["jaxpr"].jaxpr, origins, params["num_consts"], params["num_carry"])
        return outs, Flops().plus(flops, params["length"])
    if name == "while":
        skipped, consts = params["cond_nconsts"], params["body_nconsts"]
        return _loop(params["body_jaxpr"].jaxpr, origins[skipped:], consts, len(eqn.outvars))
    if name == "cond":
        branches = [_walk(branch.jaxpr, origins[1:]) for branch in params["branches"]]
        outs = [_union(across) for across in zip(*(outs for outs, _ in branches), strict=True)]
        return outs, max((flops for _, flops in branches), key=lambda f: f.total)
    for inner in _inner(eqn):
        if len(inner.invars) == len(origins) and len(inner.outvars) == len(eqn.outvars):
            return _walk(inner, origins)
    if name == "stop_gradient":
        return [o._replace(learns=False) for o in everywhere], Flops()
    return everywhere, Flops()


def _walk(jaxpr: Any, origins: Sequence[Origin]) -> tuple[list[Origin], Flops]:
    """(origins of a program's results, what it costs)."""
    origin_of = dict(zip(jaxpr.invars, origins, strict=True))
    total = Flops()
    read = lambda v: Origin() if isinstance(v, core.Literal) else origin_of.get(v, Origin())
    for eqn in jaxpr.eqns:
        outs, flops = _equation(eqn, [read(v) for v in eqn.invars])
        total = total.plus(flops)
        for v, origin in zip(eqn.outvars, outs, strict=True):
            floating = jnp.issubdtype(v.aval.dtype, jnp.floating)
            origin_of[v] = origin if floating else origin._replace(learns=False)
    return [read(v) for v in jaxpr.outvars], total


def peak_flops() -> float | None:
    """Peak of one device of this run, None where unknown (CPUs)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops
