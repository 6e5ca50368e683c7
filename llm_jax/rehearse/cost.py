"""A cost model: FLOPs, bytes held and moved, idle time and step time of a plan, from shapes alone.

It says in a millisecond what `experiments.rehearse` asks of the compiler in a minute, and is held against it in
`tests/rehearse/test_cost.py`. Sums over devices are counted as rings (Thakur et al. 2005).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.parallel import chips
from llm_jax.parallel.pipeline.interpreter import stacks
from llm_jax.parallel.plan import Plan
from llm_jax.parallel.rules import is_spec, logical_axes, size_of
from llm_jax.training import flops, rows
from llm_jax.training.precision import DTYPES
from llm_jax.training.program import Program
from llm_jax.training.run_config import RunConfig

_Sent = dict[str, float]  # bytes by mesh axes


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step on one device.

    Attributes:
      flops: operations of its products, those of recomputation included.
      held: bytes of state between steps, by kind (`Plan.bytes_per_device`).
      kept: bytes of activations between forward and backward pass.
      sent: bytes that it sends, by mesh axes.
      idle: share of the step in which a pipeline's stage waits.
    """

    flops: float
    held: dict[str, int]
    kept: float
    sent: dict[str, float]
    idle: float

    def seconds(self, chip: chips.Chip) -> tuple[float, float]:
        """(least, most) seconds of a step on a chip: all that moves behind computing, or none of it."""
        compute = self.flops / chip.flops / (1 - self.idle)
        moving = sum(self.sent.values()) / chip.links
        return max(compute, moving), compute + moving


def _share(n: int) -> float:
    """Share of an array that a device sends when its blocks are gathered, or sums are scattered, over N."""
    return (n - 1) / n


class _Parameter(NamedTuple):
    """One parameter, as a step moves it.

    Attributes:
      size: numbers that one device computes with.
      in_layers: lies in a stack.
      matrix: is a matrix, or one of every layer.
      row_sums: a stack's kernel whose products are summed over `model`, the number of its layers; else 0.
      first_only: is read before the first layer only.
      divided: ZeRO divides it.
    """

    size: float
    in_layers: bool
    matrix: bool
    row_sums: int
    first_only: bool
    divided: bool


def _parameters(plan: Plan, program: Program, tied: bool) -> list[_Parameter]:
    """Every parameter; `tied` models read the table of tokens behind the last layer too."""
    computes, stored = (plan.specs(program.params, program.axes, divided) for divided in (False, True))
    trees = logical_axes(program.params, program.axes), computes, stored
    leaves = jax.tree.leaves(program.params), *(jax.tree.leaves(tree, is_leaf=is_spec) for tree in trees)
    found = []
    for x, names, spec, whole in zip(*leaves, strict=True):
        in_layers = bool(names) and names[0] == "layers"
        matrix, of_one = len(x.shape) > 1 + in_layers, names[in_layers:]
        by_rows = len(of_one) == 2 and of_one[1] == "embed" and spec[in_layers] == "model"
        found.append(
            _Parameter(
                size=math.prod(x.shape) / math.prod(size_of(plan.mesh, axis) for axis in spec if axis is not None),
                in_layers=in_layers,
                matrix=matrix,
                row_sums=(x.shape[0] if in_layers else 1) if by_rows else 0,
                first_only=matrix and not in_layers and names[-1] == "embed" and not (tied and names[0] == "vocab"),
                divided=whole != spec and size_of(plan.mesh, plan.zero_axes) > 1,
            )
        )
    return found


def _gathers(plan: Plan, x: _Parameter, micros: int, staged: bool) -> int:
    """How often a step gathers a parameter that ZeRO divides."""
    if plan.config.zero < 3:
        return 1  # updated
    if plan.schedule is None:
        return micros * (2 if x.in_layers else 1)  # a layer's twice, forward and backward, the tables' once
    if staged and x.in_layers and x.matrix:
        return micros * (3 if plan.schedule.splits else 2)  # in every turn
    return 1


def _sums(plan: Plan, x: _Parameter, staged: bool) -> int:
    """What a sum of a gradient sends, in rings: 1 where it is scattered, 2 where compilers sum all and cut then."""
    if plan.config.explicit:
        written_out = x.in_layers or x.matrix
    else:
        written_out = x.matrix and (staged if x.in_layers else plan.config.seq > 1)
    return 1 if plan.config.zero >= 3 and x.divided and written_out else 2


def _sent_for_parameters(plan: Plan, parameters: list[_Parameter], staged: bool, itemsize: int, micros: int) -> _Sent:
    """What ZeRO and data parallelism send: parameters together, gradients in sums, once a micro-batch."""
    shape, zero, several = plan.mesh.shape, plan.config.zero, size_of(plan.mesh, plan.zero_axes)
    stored_size = 4 if zero < 3 and plan.config.master == "in_params" else itemsize
    sent = dict.fromkeys(("data", "replica", "seq", "data+seq", "pipe"), 0.0)
    for x in parameters:
        if x.divided and zero:
            sent["data"] += _gathers(plan, x, micros, staged) * x.size * stored_size * _share(several)
        # outside of the pipeline, of all micro-batches at once
        times = 1 if plan.schedule is not None and x.first_only else micros
        at_once = plan.config.seq > 1 and x.matrix and not x.in_layers  # over both axes
        for axis, n in {"data+seq": several}.items() if at_once else (("data", shape["data"]), ("seq", shape["seq"])):
            sent[axis] += _sums(plan, x, staged) * times * x.size * itemsize * _share(n)
        here = x.size / shape["data"] if x.divided and zero >= 2 else x.size
        sent["replica"] += 2 * micros * here * itemsize * _share(shape["replica"])
        if not x.in_layers and not x.first_only:
            sent["pipe"] += 2 * x.size * itemsize * _share(shape["pipe"])
    return sent


def _sent_by_rings(plan: Plan, model: Any, states: float, itemsize: int, recomputes: bool) -> float:
    """What ring attention sends along `seq`, for activations of `states` bytes a layer."""
    p, heads = plan.mesh.shape["seq"], plan.mesh.shape["model"] if plan.rules["heads"] else 1
    width = getattr(model, "head_dim", None) or model.model_dim // model.num_heads
    keys = getattr(model, "num_kv_heads", model.num_heads) * width / model.model_dim * states / heads
    queries = model.num_heads * width / model.model_dim * states / heads
    forward = 2 * (p - 1) * keys + 2 * keys + 2 * queries  # hops, and halves exchanged there and back
    back = 2 * (p - 1) * keys + 2 * p * keys * 4 / itemsize + 2 * keys + 2 * queries  # gradients in float32
    return model.num_layers * (forward * (2 if recomputes else 1) + back)


def _computed(plan: Plan) -> float:
    """How often a step's products are computed: more than once where the backward pass recomputes."""
    if plan.schedule is not None and plan.schedule.splits:
        return 5.25 / 3  # forward; again and back; again, and once more back what lies inside layers
    again = plan.config.remat == "full" or plan.config.remat.startswith(("every", "names", "offload"))
    return 4 / 3 if again or plan.schedule is not None else 1.0


def estimate(config: RunConfig, plan: Plan, program: Program, kept: float = 0.0) -> Cost:
    """The cost of one step under a plan.

    Args:
      config: the run.
      plan: of the config.
      program: of both.
      kept: bytes that one micro-batch keeps (`activations.kept`), 0 if nobody asked.
    """
    training, model, shape = config.training, config.model, plan.mesh.shape
    itemsize, computed = jnp.dtype(DTYPES[plan.config.precision]).itemsize, _computed(plan)
    micros = plan.micros(training.accumulation)
    batch = rows.example_batch(config)
    counted = flops.of_step(model, program.objective, program.params, batch, training.trainable, program.ties)
    parameters = _parameters(plan, program, getattr(model, "tied", True))
    # a pipeline of one stack, whose turns gather matrices
    staged = plan.config.zero >= 3 and plan.schedule is not None and len(stacks(program.params)) == 1
    sent = _sent_for_parameters(plan, parameters, staged, itemsize, micros)
    # bytes of one layer's activations, of all micro-batches
    positions = training.batch_size / plan.batch_divisor * training.sequence_length / shape["seq"]
    states = positions * model.model_dim * itemsize
    if shape["model"] > 1:
        pairs = sum(x.row_sums for x in parameters)
        sums = pairs * (2 + (computed > 1)) + 2  # forward, backward, forward again; the table, the head
        sent["model"] = sums * 3 * _share(shape["model"]) * states / shape["pipe"]  # gathered; summed, then cut
    if shape["seq"] > 1:
        sent["seq"] += _sent_by_rings(plan, model, states, itemsize, computed > 1)
    if plan.schedule is not None:
        sent["pipe"] += 2 * len(plan.schedule.ticks) * states / micros + 2 * _share(shape["pipe"]) * states
    return Cost(
        flops=counted.total * computed / plan.mesh.size,
        held=plan.bytes_per_device(program.shapes, program.axes),
        kept=kept * plan.alive / plan.mesh.size,
        sent={axis: size for axis, size in sent.items() if size},
        idle=plan.schedule.bubble() if plan.schedule else 0.0,
    )
