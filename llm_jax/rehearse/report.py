"""Formats the findings of a rehearsal as text."""

from collections.abc import Mapping
from typing import Any

Report = dict[str, Any]  # as `measure.rehearse` returns it, and as it is written to JSON
GB = 1e9
ADVICE = (
    "try: plan.zero=3, plan.remat=full, plan.model=2, a smaller training.batch_size, training.accumulation (of a "
    "pipeline plan.microbatches)"
)


def policies(sums_of: Mapping[str, Mapping[str, float]]) -> str:
    """A table of what one chip keeps for the backward pass under each policy, in GB."""
    lines = [f"{'plan.remat':<24}{'GB a chip':>12}{'in host memory':>18}"]
    lines += [f"{remat:<24}{sums['device'] / GB:>12.3f}{sums['host'] / GB:>18.3f}" for remat, sums in sums_of.items()]
    return "\n".join(lines)


def table(r: Report) -> str:
    """A report as text: what a chip holds, the collectives, the predicted step."""
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


def _largest(text: str) -> list[str]:
    """The largest buffers that the compiler's refusal names."""
    wanted = ("Size:", "Operator:", "Shape:")
    found = [line.strip() for line in text.splitlines() if line.strip().startswith(wanted)]
    return [f"  {line}" for line in found[:9]]
