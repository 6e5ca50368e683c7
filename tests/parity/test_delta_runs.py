"""Rows of tests of delta tuning that `make test` leaves out: further plans, forms of checkpoints, and families."""

import borrowed
import pytest

checkpoints = borrowed.module("training/test_delta_checkpoints.py")
realized = borrowed.module("training/test_realized_run.py")
ports = borrowed.module("models/test_ports.py")
folder, whole = checkpoints.folder, checkpoints.whole


@pytest.mark.parametrize("name", checkpoints.LATER)
def test_checkpoints(name, folder, whole, tmp_path):
    checkpoints.test_a_checkpoint_holds_what_trains_and_no_more(name, folder, whole)
    checkpoints.test_an_interrupted_run_resumes_bitwise(name, folder, whole, tmp_path)
    checkpoints.test_the_work_directory_loads_as_what_the_run_ended_with(name, whole)


@pytest.mark.parametrize("plan, accumulation", realized.LATER.values(), ids=realized.LATER)
def test_realized_nodes_under_further_plans(plan, accumulation):
    realized.test_every_plan_equals_one_device(plan, accumulation)


@pytest.mark.parametrize("name", [name for name in ports.FAMILIES if name not in ports.FEW])
def test_ports_of_further_families(name):
    ports.test_gradients_reach_every_node_stacked_as_unstacked_and_recomputed(name)
