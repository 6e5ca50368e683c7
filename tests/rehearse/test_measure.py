"""What is read of a compiled program, by hand: times, memory, kernels; and what needs no compiler, in closed form."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from tpu_program import TPU

from llm_jax.models.llama import LlamaConfig
from llm_jax.parallel import chips
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.rehearse import hlo, measure, report, serving
from llm_jax.training.loop import LoopConfig
from llm_jax.training.run_config import RunConfig

L, D, F, V, ROWS, T = 2, 32, 64, 64, 8, 16
MODEL = LlamaConfig(
    vocab_size=V, context_length=T, model_dim=D, num_layers=L, num_heads=4, num_kv_heads=4, hidden_dim=F, tied=False
)
CHIP = chips.Chip("", flops=10.0, hbm=67.0, hbm_bandwidth=1.0, links=100.0, clock=10.0)
MEMORY = SimpleNamespace(
    argument_size_in_bytes=40,
    output_size_in_bytes=10,
    alias_size_in_bytes=10,
    temp_size_in_bytes=20,
    peak_memory_in_bytes=100,
    host_argument_size_in_bytes=30,
    host_temp_size_in_bytes=5,
    generated_code_size_in_bytes=7,
)


def config(**plan):
    training = LoopConfig(batch_size=ROWS, sequence_length=T, steps=1)
    return RunConfig(MODEL, plan=PlanConfig(**plan), training=training)


def test_times_and_memory_of_a_program():
    plan = Plan(PlanConfig(replica=2, data=4), MODEL)
    given = {"model_flops": 1000.0, "chips": 8, "tokens_per_step": 100}
    found = measure.measure(TPU, MEMORY, plan, CHIP, given, True)
    compute = 4 * (5 + 100 + 30 + 5 + 11) / 10
    gather, permute = 4 * 8 * 64 * 2 * 3 / 4 / 100, 4 * 256 / 100
    behind = gather + 4 * 11 / 10  # all of the gather, and as much of the permutation as runs beside it
    assert found["compute_seconds"] == pytest.approx(compute) and found["kernel_seconds"] == 0
    assert found["moving_seconds"] == pytest.approx(gather + permute)
    assert found["hidden"] == pytest.approx(behind / (gather + permute)) and found["hidden_gathers"] == 1
    assert found["step_seconds"] == pytest.approx(compute + gather + permute - behind)
    assert found["tokens_per_second"] == pytest.approx(100 / found["step_seconds"])
    assert found["mfu_bound"] == pytest.approx(1000 / 8 / 10 / compute)
    assert found["mfu"] == pytest.approx(1000 / 8 / 10 / found["step_seconds"])
    assert [(row["kind"], row["axes"]) for row in found["collectives"]] == [
        ("all-gather", "data"),
        ("collective-permute", "data"),
    ]
    # what lies on the chip, less than the compiler's peak without the host's, and the code
    assert found["memory"] == {"arguments": 40, "host": 35, "code": 7, "peak": 40 + 20 + 7}
    assert (
        found["fits"]
        and not measure.measure(TPU, MEMORY, plan, dataclasses.replace(CHIP, hbm=66.0), given, True)["fits"]
    )
    whole = {
        **given, **found, "topology": "v5e:2x4", "mesh": {"data": 4}, "parameters": 5e9, "tokens_per_chip": 12.5,
        "step": "train", "held": {"parameters": 2e9}, "hbm": 16e9, "reading_seconds": 1.0,
    }  # fmt: skip
    text = report.table(whole)
    assert "v5e:2x4: 8 chips, mesh {'data': 4}, 5.00 B parameters" in text and "parameters 2.00 of 16.0 GB" in text
    assert "\nfits: 0.00 GB a chip at most" in text and "predicted step" in text
    refused = {k: v for k, v in whole.items() if k not in found} | {"compiler": "Ran out of memory\n Size: 3G"}
    assert report.table(refused).splitlines()[2:] == ["does not fit: Ran out of memory", "  Size: 3G", report.ADVICE]


@pytest.mark.parametrize("kernel, products", [("splash_mha_fwd", 2), ("splash_mha_dkv", 4), ("splash_mha_dq", 3)])
def test_operations_of_kernels(kernel, products):
    """Of four blocks of 512 x 512 a causal mask hides one."""
    array = "bf16[2,4,1024,128]{3,2,1,0}"
    line = f"  ROOT %{kernel}.7 = {array} custom-call(%p, %p), operand_layout_constraints={{{array}, {array}}}"
    text = f"HloModule m\n\nENTRY %main (p: {array}) -> {array} {{\n  %p = {array} parameter(0)\n{line}\n}}\n"
    whole = products * 2 * 2 * 4 * 1024 * 1024 * 128
    assert measure.kernel_flops(hlo.parse(text), None, False) == whole
    assert measure.kernel_flops(hlo.parse(text), None, True) == whole * 3 / 4


def test_a_tick_lasts_as_long_as_its_slowest_device():
    plan = Plan(PlanConfig(data=4, pipe=2), MODEL)
    ticks = plan.schedule.ticks
    ends = lambda items: any(i.kind == "B" for i in items)  # the last device's B has the head before it
    slowest = [max(len(tick[0]), len(tick[1]) + ends(tick[1])) for tick in ticks]
    seconds = lambda turns: 10 + sum(turns.values())
    assert measure.in_lockstep(plan, seconds) == pytest.approx(10 + sum(slowest) / len(ticks))


@pytest.mark.parametrize("step, width", [("prefill", T), ("decode", 1)])
def test_what_serves_lies_as_it_computes(step, width):
    run = config(data=4, model=2)
    lowered, figures = serving.lower(run, Plan(run.plan, MODEL), step)
    layers = L * (4 * D * D + 3 * D * F)
    norms = (2 * L + 1) * D
    assert figures["parameters"] == 2 * V * D + layers + norms
    assert figures["held"]["parameters"] == 4 * ((2 * V * D + layers) / 2 + norms)
    assert figures["held"]["cache"] == 4 * (2 * L * ROWS * T * D / 8 + ROWS / 4)  # keys, values; and lengths
    assert figures["tokens_per_step"] == ROWS * width
    products = 2 * (layers + V * D) if step == "decode" else 0
    assert figures["model_flops"] >= ROWS * products
    assert f"tensor<{ROWS}x{width}xi32>" in lowered.as_text()
    with pytest.raises(ValueError, match="serves along data and model: leave plan.pipe and plan.seq"):
        serving.lower(config(data=4, pipe=2), Plan(PlanConfig(data=4, pipe=2), MODEL), step)


def test_what_policies_keep():
    found = measure.policies(config(data=8), jax.devices())
    device = {remat: sums["device"] for remat, sums in found.items()}
    assert device["none"] > device["dots"] > device["names:attention,mlp"] > device["full"]
    assert found["offload:block"]["host"] == L * ROWS * T * D * 4 / 8 and found["full"]["host"] == 0
    name, *numbers = report.policies(found).splitlines()[-1].split()
    assert name == "full" and [float(n) for n in numbers] == [round(device["full"] / 1e9, 3), 0.0]
