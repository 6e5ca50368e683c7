"""Optimizer state on disk: bitwise what it is in memory, updated by pieces, resumed from and as either."""

import dataclasses

import jax
import numpy as np
import pytest
from plan_runs import MODELS_HERE, OPTIMIZER, ROWS, STEPS, T, first_params, task

from llm_jax.nn import paths
from llm_jax.parallel.memory.disk import PARTS
from llm_jax.parallel.plan import Plan, PlanConfig
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.loop import LoopConfig
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.program import build
from llm_jax.training.run_config import RunConfig

HALF = dict(precision="bf16", master="in_optimizer")


def made(name, plan, scratch=None, optimizer=OPTIMIZER, **training):
    training = LoopConfig(batch_size=ROWS, sequence_length=T, steps=STEPS, **training)
    model = MODELS_HERE[name]
    config = RunConfig(
        model, objective=task(name)[0], optimizer=optimizer, plan=PlanConfig(data=1, **plan), training=training
    )
    plan = Plan(config.plan, model, jax.devices()[:1])
    return build(config, plan, 3, jax.eval_shape(lambda: first_params(name)), scratch=scratch)


def run(program, name):
    state = program.init(jax.random.key(3), jax.tree.map(np.copy, first_params(name)))
    metrics, batches = [], task(name)[1]
    # bfloat16 gradients are rounded even where they are not stored; and the emitters that users get, not those of tests
    exact = {"xla_allow_excess_precision": False, "xla_cpu_use_fusion_emitters": True}
    step = program.step.lower(state, batches[0]).compile(exact)
    for batch in batches:
        state, values = step(state, batch)
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """((program, state, metrics) on disk, the same in memory): a master copy in files, and an average."""
    plans = {**HALF, "offload": ("disk",)}, HALF
    programs = [made("llama", plan, tmp_path_factory.mktemp("scratch"), ema=0.5) for plan in plans]
    return tuple((program, *run(program, "llama")) for program in programs)


@pytest.mark.parametrize("name, plan, training, optimizer", [
    ("llama", {}, {}, OPTIMIZER),
    ("t5", {}, {"trainable": ("re:.*(encoder|embed).*",)}, dataclasses.replace(OPTIMIZER, name="lion", eps=1e-8)),
    ("albert", {}, {}, dataclasses.replace(OPTIMIZER, name="sgd", b1=0.5, eps=1e-8)),
], ids=["adamw", "a part by lion", "sgd"])  # fmt: skip
def test_bitwise_equal_to_the_resident_run(name, plan, training, optimizer, tmp_path):
    on_disk = made(name, {**plan, "offload": ("disk",)}, tmp_path, optimizer, **training)
    memory = made(name, plan, None, optimizer, **training)
    assert_bitwise_equal((on_disk, *run(on_disk, name)), (memory, *run(memory, name)))


def test_master_copy_and_average_are_bitwise_equal(halves):
    assert_bitwise_equal(*halves)


def assert_bitwise_equal(disk, memory):
    (program, state, metrics), (_, want, want_metrics) = disk, memory
    files, seen = program.on_disk.arrays, set()
    for (path, a), (_, b) in zip(*(paths.flatten(s.replace(key=None)) for s in (state, want)), strict=True):
        if path in files:
            assert a.shape == (1,) and path.split("/")[0] in PARTS
            a = files[path]
            seen.add(path)
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert metrics == want_metrics
    assert seen == set(files) and len(seen) > 5


def test_memory_is_parameters_gradients_and_two_pieces(tmp_path):
    """Of a model of eight layers, of its compiled step."""
    deep = dataclasses.replace(MODELS_HERE["llama"], num_layers=8, model_dim=64, hidden_dim=256, vocab_size=31)
    taken = {}
    for offload in ((), ("disk",)):
        plan = PlanConfig(data=1, offload=offload, remat="full")
        training = LoopConfig(batch_size=2, sequence_length=T, steps=STEPS)
        config = RunConfig(deep, optimizer=OPTIMIZER, plan=plan, training=training)
        program = build(config, Plan(plan, deep, jax.devices()[:1]), None, scratch=tmp_path)
        shapes = program.shapes if program.on_disk is None else jax.eval_shape(program.on_disk.without, program.shapes)
        batch = {"input_ids": jax.ShapeDtypeStruct((2, T + 1), np.int32)}
        taken[offload] = program.step.lower(shapes, batch).compile().memory_analysis()
        size = sum(4 * x.size for x in jax.tree.leaves(program.shapes.params))
    assert taken[()].argument_size_in_bytes >= 3 * size
    assert taken["disk",].argument_size_in_bytes < 1.01 * size + 1000
    assert taken["disk",].temp_size_in_bytes < taken[()].temp_size_in_bytes + size / 2


def test_checkpoints_go_over_from_disk_to_memory_and_back(halves, tmp_path):
    """A checkpoint of either kind restores as either, bitwise; its average can be read."""
    (disk, state, _), (memory, want, _) = halves
    first = Checkpoints(tmp_path / "disk", mapped=disk.on_disk.arrays)
    first.save(2, state, {})
    first.close()
    again = Checkpoints(tmp_path / "disk").restore(memory.shapes, 2, memory.shardings).state
    second = Checkpoints(tmp_path / "memory")
    second.save(2, again, {})
    second.close()
    other = made("llama", {**HALF, "offload": ("disk",)}, tmp_path / "other", ema=0.5)
    back = Checkpoints(tmp_path / "memory", mapped=other.on_disk.arrays).restore(other.shapes, 2, other.shardings).state
    raw = lambda s: paths.flatten(s.replace(key=jax.random.key_data(s.key)))
    for (path, x), (_, y), (_, z), (_, own) in zip(*map(raw, (want, again, back, state)), strict=True):
        np.testing.assert_array_equal(y, x, err_msg=path)
        files = other.on_disk.arrays
        np.testing.assert_array_equal(files.get(path, z), x, err_msg=path)
        assert z.shape == own.shape
    average, _ = Checkpoints(tmp_path / "disk", read_only=True).restore_params(average=True)
    for (path, a), b in zip(paths.flatten(average), jax.tree.leaves(want.average), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b).astype(a.dtype), err_msg=path)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="plan.offload=disk stands alone"):
        PlanConfig(offload=("disk", "update"))
    with pytest.raises(ValueError, match="plan.offload=disk is for one device, the mesh has 8"):
        Plan(PlanConfig(offload=("disk",)), MODELS_HERE["llama"])
    with pytest.raises(ValueError, match="plan.offload=disk needs a folder"):
        made("llama", {"offload": ("disk",)})
    with pytest.raises(ValueError, match="by pieces .*, not muon: set plan.offload="):
        made("llama", {"offload": ("disk",)}, tmp_path, OptimizerConfig("muon"))
