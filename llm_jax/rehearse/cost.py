"""A cost model: FLOPs, bytes held and moved, idle time and step time of a plan, from shapes alone.

It says in a millisecond what `experiments.rehearse` asks of the compiler in a minute, and is held against it in
`tests/rehearse/test_cost.py`. Sums over devices are counted as rings (Thakur et al. 2005).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.parallel import chips
from llm_jax.parallel.pipeline.interpreter import stacks
from llm_jax.parallel.plan import Plan
from llm_jax.parallel.rules import logical_axes, size_of
from llm_jax.training import flops, rows
from llm_jax.training.precision import DTYPES
from llm_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step on one device.

    Attributes:
      flops: operations of its products, those of recomputation included.
      held: bytes between steps, by kind (`Plan.bytes_per_device`).
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


def _leaves(plan: Plan, program: Program) -> Iterator[tuple[Any, P, P, P]]:
    """(parameter, its logical axes, its mesh axes as it computes, and as it is stored) of every leaf."""
    is_spec = lambda x: isinstance(x, P)
    specs = (plan.specs(program.params, program.axes, divided) for divided in (False, True))
    trees = logical_axes(program.params, program.axes), *specs
    return zip(jax.tree.leaves(program.params), *(jax.tree.leaves(t, is_leaf=is_spec) for t in trees), strict=True)


def _parameters(plan: Plan, program: Program, itemsize: int, micros: int, tied: bool) -> dict[str, float]:
    """What ZeRO and data parallelism move: parameters together, gradients in sums, once a micro-batch."""
    mesh, zero, own = plan.mesh, plan.config.zero, plan.config
    n = size_of(mesh, plan.zero_axes)
    stored_size = 4 if own.master == "in_params" else itemsize
    sent = dict.fromkeys(("data", "replica", "seq", "data+seq", "pipe"), 0.0)
    staged = zero >= 3 and plan.schedule is not None and len(stacks(program.params)) == 1  # whose turns gather matrices
    each = 3 if plan.schedule is not None and plan.schedule.splits else 2
    for x, name, spec, stored in _leaves(plan, program):
        layers = bool(name) and name[0] == "layers"
        matrix = layers and len(x.shape) > 2
        size = math.prod(x.shape) / math.prod(size_of(mesh, a) for a in spec if a is not None)
        divided = stored != spec and n > 1
        if divided and zero >= 3:  # a layer's twice, forward and backward, the tables' once
            turns = micros * each if staged and matrix else 1 if plan.schedule else micros * (2 if layers else 1)
            sent["data"] += turns * size * itemsize * _share(n)
        elif divided and zero >= 1:
            sent["data"] += size * stored_size * _share(n)
        table = not layers and len(x.shape) > 1
        written = (layers or table) if own.explicit else (staged and matrix) or (table and own.seq > 1)
        first_only = table and name[-1] == "embed" and not (tied and name[0] == "vocab")
        times = 1 if plan.schedule is not None and first_only else micros  # outside of the pipeline, of all at once
        sums = 1 if divided and zero >= 3 and written else 2  # compilers sum and cut, where ZeRO scatters
        if own.seq > 1 and table:  # at once over both
            sent["data+seq"] += sums * times * size * itemsize * _share(n)
        else:
            for axis in ("data", "seq"):
                sent[axis] += sums * times * size * itemsize * _share(mesh.shape[axis])
        here = size / mesh.shape["data"] if divided and zero >= 2 else size
        sent["replica"] += 2 * micros * here * itemsize * _share(mesh.shape["replica"])
        if not layers and not first_only:
            sent["pipe"] += 2 * size * itemsize * _share(mesh.shape["pipe"])
    return sent


def _pairs(plan: Plan, program: Program) -> int:
    """Products in all layers whose sums cross the `model` axis: kernels divided by rows."""
    total = 0
    for x, name, spec, _ in _leaves(plan, program):
        stacked = int(bool(name) and name[0] == "layers")
        if len(name) - stacked == 2 and name[-1] == "embed" and spec[stacked] == "model":
            total += x.shape[0] if stacked else 1
    return total


def estimate(config: Any, plan: Plan, program: Program, kept: float = 0.0) -> Cost:
    """The cost of one step under a plan.

    Args:
      config: a `RunConfig`.
      plan: of the config.
      program: of both.
      kept: bytes that one micro-batch keeps (`activations.kept`), 0 if nobody asked.
    """
    c, own, mesh = config.training, config.plan, plan.mesh
    shape, model = mesh.shape, config.model
    itemsize = jnp.dtype(DTYPES[own.precision]).itemsize
    again = own.remat == "full" or own.remat.startswith(("every", "names", "offload"))
    recompute = 4 / 3 if again or plan.schedule is not None else 1.0
    if plan.schedule is not None and plan.schedule.splits:
        recompute = 5.25 / 3  # forward; again and back; again, and once more back what lies inside layers
    micros = plan.micros(c.accumulation)
    batch = rows.example_batch(config)
    counted = flops.of_step(model, program.objective, program.params, batch, c.trainable)
    sent = _parameters(plan, program, itemsize, micros, getattr(model, "tied", True))
    states = (
        c.batch_size / plan.batch_divisor * c.sequence_length / shape["seq"] * model.model_dim * itemsize
    )  # of all micro-batches
    if shape["model"] > 1:
        pairs = _pairs(plan, program)
        sums = pairs * (2 + (recompute > 1)) + 2  # forward, backward, forward again; the table, the head
        sent["model"] = sums * 3 * _share(shape["model"]) * states / shape["pipe"]  # gathered; summed, then cut
    if shape["seq"] > 1:
        heads = shape["model"] if plan.rules["heads"] else 1
        width = getattr(model, "head_dim", None) or model.model_dim // model.num_heads
        keys = getattr(model, "num_kv_heads", model.num_heads) * width / model.model_dim * states / heads
        queries = model.num_heads * width / model.model_dim * states / heads
        p = shape["seq"]
        forward = 2 * (p - 1) * keys + 2 * keys + 2 * queries  # hops, and halves exchanged there and back
        back = 2 * (p - 1) * keys + 2 * p * keys * 4 / itemsize + 2 * keys + 2 * queries  # gradients in float32
        sent["seq"] += model.num_layers * (forward * (2 if recompute > 1 else 1) + back)
    if plan.schedule is not None:
        sent["pipe"] += 2 * len(plan.schedule.ticks) * states / micros + 2 * _share(shape["pipe"]) * states
    return Cost(
        flops=counted.total * recompute / mesh.size,
        held=plan.bytes_per_device(program.shapes, program.axes),
        kept=kept * plan.alive / mesh.size,
        sent={axis: size for axis, size in sent.items() if size},
        idle=plan.schedule.bubble() if plan.schedule else 0.0,
    )
