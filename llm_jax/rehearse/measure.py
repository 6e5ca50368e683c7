"""What `rehearse` measures: a compiled step's memory, collectives and time bounds, as one dictionary."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Lowered

from llm_jax.nn import weights
from llm_jax.nn.execution import Execution
from llm_jax.parallel import chips
from llm_jax.parallel.pipeline.schedules import TURNS, tables, turn_shares
from llm_jax.parallel.plan import Plan
from llm_jax.parallel.splash import BLOCK
from llm_jax.rehearse import activations, hlo, serving
from llm_jax.rehearse.report import Report
from llm_jax.training import flops, rows
from llm_jax.training.program import Program, build
from llm_jax.training.run_config import RunConfig
from llm_jax.training.state import TrainState

LAYOUT = re.compile(r"(?:bf16|f32)\[([\d,]+)\]\{")  # of a kernel's operands: queries, keys, values, ...


def abstract(config: RunConfig, plan: Plan, program: Program) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The arguments of the train step, without memory behind them."""
    described = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    batch = {name: described(x, plan.batch_sharding()) for name, x in rows.example_batch(config).items()}
    return jax.tree.map(described, program.shapes, program.shardings), batch


def policies(config: RunConfig, devices: Sequence[jax.Device]) -> dict[str, dict[str, float]]:
    """Bytes that one chip keeps for the backward pass under each policy: see `activation_bytes`."""
    found = {}
    for remat in activations.POLICIES:
        allowed = dataclasses.replace(config.plan, remat=remat, explicit=False)  # explicit keeps as much, allows less
        plan = Plan(allowed, config.model, devices)
        found[remat] = activation_bytes(config, plan, build(dataclasses.replace(config, plan=allowed), plan, 0))
    return found


def activation_bytes(config: RunConfig, plan: Plan, program: Program) -> dict[str, float]:
    """Bytes that one chip keeps of its layers, for the micro-batches that are alive at once: `device`, `host`."""
    micros = plan.micros(config.training.accumulation)
    batch = {
        name: jax.ShapeDtypeStruct((config.training.batch_size // micros, *x.shape[1:]), x.dtype)
        for name, x in rows.example_batch(config).items()
    }
    execution = dataclasses.replace(plan.execution(), constrain=Execution().constrain, kernel=None)
    whole = activations.residual_bytes(config, program.objective, program.params, batch, execution)
    return {memory: size * plan.alive / plan.mesh.size for memory, size in whole.items()}


def model_flops(config: RunConfig, program: Program) -> float:
    """FLOPs of a step that a bound on MFU is made of: as `flops.of_step`, causal attention at half."""
    batch, trainable = rows.example_batch(config), config.training.trainable
    counted = flops.of_step(config.model, program.objective, program.params, batch, trainable, program.ties)
    return counted.useful(config.model.reads == "causal")


def _training(config: RunConfig, plan: Plan) -> tuple[Lowered, Report]:
    """The train step, not compiled yet, and its figures that need no compiler."""
    program = build(config, plan, 0)
    figures = {
        "parameters": weights.count(program.params),
        "tokens_per_step": config.training.batch_size * config.training.sequence_length,
        "held": plan.bytes_per_device(program.shapes, program.axes),
        "model_flops": model_flops(config, program),
    }
    return program.step.lower(*abstract(config, plan, program)), figures


def rehearse(config: RunConfig, topology: str, step: str = "train", hlo_file: str | None = None) -> Report:
    """Compiles a step for a topology.

    Args:
      config: the run.
      topology: as `v5e:16x16`.
      step: `train`, `prefill` or `decode`.
      hlo_file: where the optimized program goes.

    Raises:
      TopologyError, ValueError: where the topology is unknown or the plan does not fit the model.
    """
    chip = chips.CHIPS[chips.split(topology)[0]]
    devices = chips.describe(topology).devices
    plan = Plan(config.plan, config.model, devices)
    lowered, figures = _training(config, plan) if step == "train" else serving.lower(config, plan, step)
    report: Report = {
        "topology": topology,
        "step": step,
        "chips": len(devices),
        "mesh": {a: n for a, n in plan.mesh.shape.items() if n > 1},
        "tokens_per_chip": figures["tokens_per_step"] / len(devices),
        "hbm": chip.hbm,
        "reading_seconds": sum(figures["held"].values()) / chip.hbm_bandwidth,
        **figures,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {**report, "fits": False, "compiler": str(e)}
    text = compiled.as_text() or ""
    if hlo_file:
        with open(hlo_file, "w") as f:
            f.write(text)
    return {**report, **measure(text, compiled.memory_analysis(), plan, chip, report, config.model.reads == "causal")}


PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}  # of T x S x H, a head


def kernel_flops(program: hlo.Program, turns: Mapping[str, float] | None, causal: bool) -> float:
    """Operations of attention's kernels, whose cycles the compiler does not estimate; hidden blocks are skipped."""
    times, total = program.calls(turns), 0.0
    for name, computation in program.computations.items():
        for i in computation.values():
            products = next((n for kernel, n in PRODUCTS.items() if i.name.startswith(kernel)), 0)
            if i.opcode != "custom-call" or not products:
                continue
            q, k = (tuple(map(int, dims.split(","))) for dims in LAYOUT.findall(i.attributes)[:2])
            blocks = -(-q[-2] // BLOCK)
            seen = (blocks + 1) / (2 * blocks) if causal else 1.0
            total += times[name] * products * 2 * math.prod(q) * k[-2] * seen
    return total


def in_lockstep(plan: Plan, seconds: Callable[[Mapping[str, float] | None], float]) -> float:
    """Seconds of a step, of a function of how often a tick's turns are taken: a tick ends with its slowest device."""
    if plan.schedule is None:
        return seconds(None)
    none, table = dict.fromkeys(TURNS, 0.0), tables(plan.schedule)
    base = seconds(none)
    ticks = np.array([(seconds({**none, turn: 1.0}) - base) * table[turn] for turn in TURNS]).sum(axis=0)
    return base + float(ticks.max(axis=1).mean())  # of [ticks, devices]


def measure(text: str, memory: Any, plan: Plan, chip: chips.Chip, report: Report, causal: bool) -> Report:
    """What a compiled program says of itself.

    Args:
      text: the optimized program.
      memory: its `memory_analysis()`.
      plan: what it was compiled for.
      chip: of the devices.
      report: needs `model_flops`, `chips` and `tokens_per_step`.
      causal: whether attention's kernels skip what a causal mask hides.
    """
    program, taken = hlo.parse(text), _memory(memory)
    found = hlo.collectives(program, None if plan.schedule is None else turn_shares(plan.schedule))
    kernels = in_lockstep(plan, lambda turns: kernel_flops(program, turns, causal) / chip.flops)
    compute = kernels + in_lockstep(plan, lambda turns: program.cycles(turns) / chip.clock)
    moving = [c.sent(0) / chip.links for c in found]
    hidden = [min(t, c.times * c.cover / chip.clock) for t, c in zip(moving, found, strict=True)]
    gathers = [(t, h) for t, h, c in zip(moving, hidden, found, strict=True) if c.kind == "all-gather"]
    step = compute + sum(moving) - sum(hidden)
    ideal = report["model_flops"] / (report["chips"] * chip.flops)
    return {
        "fits": taken["peak"] <= chip.hbm,
        "memory": taken,
        "collectives": [
            {"kind": kind, "axes": axes, **row} for (kind, axes), row in hlo.table(found, plan.mesh).items()
        ],
        "compute_seconds": compute,
        "kernel_seconds": kernels,
        "moving_seconds": sum(moving),
        "hidden": sum(hidden) / max(sum(moving), 1e-30),
        "hidden_gathers": sum(h for _, h in gathers) / max(sum(t for t, _ in gathers), 1e-30),
        "step_seconds": step,
        "tokens_per_second": report["tokens_per_step"] / step,
        "mfu": ideal / step,
        "mfu_bound": ideal / compute if compute else 0.0,
    }


def _memory(memory: Any) -> dict[str, int]:
    """Bytes by kind; `peak` is of a chip's own memory, code included."""
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    # the compiler's peak is of device and host together; what lies on the device alone bounds it as well
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    return {
        "arguments": arguments,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": min(peak, arguments + memory.temp_size_in_bytes + results) + memory.generated_code_size_in_bytes,
    }
