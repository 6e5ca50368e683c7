"""What `rehearse` measures: a compiled step's memory, collectives and time bounds, as one dictionary and one table."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.nn import weights
from llm_jax.nn.execution import Execution
from llm_jax.parallel import chips
from llm_jax.parallel.pipeline.schedules import TURNS, tables, turn_shares
from llm_jax.parallel.plan import Plan
from llm_jax.parallel.splash import BLOCK
from llm_jax.rehearse import activations, hlo, serving
from llm_jax.training import flops, rows
from llm_jax.training.program import Program, build
from llm_jax.training.run_config import RunConfig

GB = 1e9
LAYOUT = re.compile(r"(?:bf16|f32)\[([\d,]+)\]\{")  # of a kernel's operands: queries, keys, values, ...


def abstract(config: RunConfig, plan: Plan, program: Program) -> tuple[Any, Any]:
    """The arguments of the train step, without memory behind them."""
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), program.shapes, program.shardings
    )
    spread = plan.batch_sharding()
    batch = rows.example_batch(config)
    return state, {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for k, x in batch.items()}


def policies(config: RunConfig, topology: str) -> str:
    """A table of what one chip keeps for the backward pass under each policy, in GB."""
    devices = chips.describe(topology).devices
    lines = [f"{'plan.remat':<24}{'GB a chip':>12}{'in host memory':>18}"]
    for remat in activations.POLICIES:
        own = dataclasses.replace(config.plan, remat=remat, explicit=False)  # which keeps as much, and allows less
        plan = Plan(own, config.model, devices)
        program = build(dataclasses.replace(config, plan=plan.config), plan, 0)
        sums = kept(config, plan, program)
        lines.append(f"{remat:<24}{sums['device'] / GB:>12.3f}{sums['host'] / GB:>18.3f}")
    return "\n".join(lines)


def kept(config: RunConfig, plan: Plan, program: Program) -> dict[str, float]:
    """Bytes that one chip keeps, of its own layers and of the micro-batches that are alive at once."""
    micros = plan.micros(config.training.accumulation)
    batch = {
        name: jax.ShapeDtypeStruct((config.training.batch_size // micros, *x.shape[1:]), x.dtype)
        for name, x in abstract(config, plan, program)[1].items()
    }
    execution = dataclasses.replace(plan.execution(), constrain=Execution().constrain, kernel=None)
    whole = activations.kept(config, program.objective, program.params, batch, execution)
    return {place: size * plan.alive / plan.mesh.size for place, size in whole.items()}


def model_flops(config: RunConfig, program: Program) -> float:
    """FLOPs of a step that a bound on MFU is made of: as `flops.of_step`, causal attention at half."""
    batch, trainable = rows.example_batch(config), config.training.trainable
    counted = flops.of_step(config.model, program.objective, program.params, batch, trainable)
    return counted.useful(config.model.reads == "causal")


def _training(config: RunConfig, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The train step, not compiled yet, and what is known of it."""
    program = build(config, plan, 0)
    tokens = config.training.batch_size * config.training.sequence_length
    known = {
        "parameters": weights.count(program.params),
        "tokens_per_step": tokens,
        "held": plan.bytes_per_device(program.shapes, program.axes),
        "model_flops": model_flops(config, program),
    }
    return program.step.lower(*abstract(config, plan, program)), known


def rehearse(config: RunConfig, topology: str, step: str = "train", hlo_file: str | None = None) -> dict[str, Any]:
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
    lowered, known = _training(config, plan) if step == "train" else serving.lower(config, plan, step)
    report: dict[str, Any] = {
        "topology": topology,
        "step": step,
        "chips": len(devices),
        "mesh": {a: n for a, n in plan.mesh.shape.items() if n > 1},
        "tokens_per_chip": known["tokens_per_step"] / len(devices),
        "hbm": chip.hbm,
        "reading_seconds": sum(known["held"].values()) / chip.hbm_bandwidth,
        **known,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {**report, "fits": False, "compiler": str(e)}
    text = compiled.as_text()
    if hlo_file:
        with open(hlo_file, "w") as f:
            f.write(text)
    return {**report, **measure(text, compiled.memory_analysis(), plan, chip, report, config.model.reads == "causal")}


PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}  # of T x S x H, a head


def kernel_flops(program: hlo.Program, turns: Any, causal: bool) -> float:
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


def measure(
    text: str, memory: Any, plan: Plan, chip: chips.Chip, report: dict[str, Any], causal: bool
) -> dict[str, Any]:
    """What the compiled program says of itself."""
    parsed = hlo.parse(text)
    found = hlo.collectives(parsed, None if plan.schedule is None else turn_shares(plan.schedule))
    kernels = in_lockstep(plan, lambda turns: kernel_flops(parsed, turns, causal) / chip.flops)
    compute = kernels + in_lockstep(plan, lambda turns: parsed.cycles(turns) / chip.clock)
    moving = [c.sent(0) / chip.links for c in found]
    hidden = [min(t, c.times * c.cover / chip.clock) for t, c in zip(moving, found, strict=True)]
    gathers = [(t, h) for t, h, c in zip(moving, hidden, found, strict=True) if c.kind == "all-gather"]
    step = compute + sum(moving) - sum(hidden)
    ideal = report["model_flops"] / (report["chips"] * chip.flops)
    # the compiler's peak is of device and host together; what lies on the device alone bounds it as well
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    peak = min(peak, arguments + memory.temp_size_in_bytes + results) + memory.generated_code_size_in_bytes
    return {
        "fits": peak <= chip.hbm,
        "memory": {
            "arguments": arguments,
            "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": peak,
        },
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


def table(r: dict[str, Any]) -> str:
    """A report to read."""
    lines = [
        f"{r['topology']}: {r['chips']} chips, mesh {r['mesh']}, {r['parameters'] / GB:.2f} B parameters, "
        f"{r['tokens_per_chip']:,.0f} tokens a chip a step ({r['step']})",
        "a chip holds " + ", ".join(f"{k} {v / GB:.2f}" for k, v in r["held"].items()) + f" of {r['hbm'] / GB:.1f} GB",
    ]
    if "memory" not in r:
        reason = next((x for x in r["compiler"].splitlines() if "exceed" in x.lower() or "ran out" in x.lower()), "")
        return "\n".join([*lines, f"does not fit: {reason.strip()}", *_largest(r["compiler"]), ADVICE])
    m = r["memory"]
    lines.append(
        f"{'fits' if r['fits'] else 'does not fit'}: {m['peak'] / GB:.2f} GB a chip at most (arguments "
        f"{m['arguments'] / GB:.2f}, code {m['code'] / GB:.2f})"
        + (f", {m['host'] / GB:.2f} of host memory, whose traffic no time below holds" if m["host"] else "")
    )
    if not r["fits"]:
        lines.append(ADVICE)
    lines.append(f"{'collective':<20}{'axes':<14}{'runs':>8}{'GB':>10}{'GB sent':>10}")
    for row in sorted(r["collectives"], key=lambda row: -row["sent"]):
        size, sent = row["bytes"] / GB, row["sent"] / GB
        lines.append(f"{row['kind']:<20}{row['axes']:<14}{row['calls']:>8,.0f}{size:>10.3f}{sent:>10.3f}")
    lines.append(
        f"predicted step {r['step_seconds']:.3f} s: computing {r['compute_seconds']:.3f} (attention's kernels "
        f"{r['kernel_seconds']:.3f} at the chip's peak), moving "
        f"{r['moving_seconds']:.3f} of which {r['hidden']:.0%} behind computing ({r['hidden_gathers']:.0%} of gathers)"
    )
    if r["step"] == "decode":
        lines.append(f"to read weights and cache once takes {r['reading_seconds']:.4f} s")
    lines.append(
        f"{r['tokens_per_second']:,.0f} tokens/s, MFU {r['mfu']:.2f}, at most {r['mfu_bound']:.2f} were nothing moved"
    )
    return "\n".join(lines)


ADVICE = (
    "try: plan.zero=3, plan.remat=full, plan.model=2, a smaller training.batch_size, training.accumulation (of a "
    "pipeline plan.microbatches)"
)


def _largest(text: str) -> list[str]:
    """The largest buffers that the compiler's refusal names."""
    wanted = ("Size:", "Operator:", "Shape:")
    found = [line.strip() for line in text.splitlines() if line.strip().startswith(wanted)]
    return [f"  {line}" for line in found[:9]]
