from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType

from llm_jax.parallel.mesh import AXES, make_mesh
from llm_jax.parallel.mesh import _position as position


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"data": 8}, (1, 8, 1, 1, 1)),
        ({"data": -1}, (1, 8, 1, 1, 1)),
        ({"data": -1, "model": 2}, (1, 4, 1, 1, 2)),
        ({"replica": 2, "data": -1, "model": 4}, (2, 1, 1, 1, 4)),
        ({"data": 2, "pipe": 4}, (1, 2, 4, 1, 1)),
        ({"data": 2, "seq": 4}, (1, 2, 1, 4, 1)),
        ({"model": 8}, (1, 1, 1, 1, 8)),
    ],
)
def test_every_axis_is_there_and_auto(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_tpus_lie_slice_by_slice_along_the_torus():
    """Given host by host: replicas are slices, and data goes along x, then y, in each."""
    make = lambda s, x, y: SimpleNamespace(
        platform="tpu", slice_index=s, coords=[x, y, 0], core_on_chip=0, process_index=0
    )
    devices = [make(s, x, y) for x in (0, 1) for s in (1, 0) for y in (0, 1)]
    assert [position(d) for d in sorted(devices, key=position)] == [
        (s, 0, y, x, 0) for s in (0, 1) for y in (0, 1) for x in (0, 1)
    ]


def test_some_devices():
    assert make_mesh({"data": -1}, jax.devices()[:3]).devices.shape == (1, 3, 1, 1, 1)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"data": 4}, r"need 4 devices, there are 8: change plan.data, plan.pipe, plan.seq or plan.model,"),
        ({"data": 3, "model": 4}, r"'data': 3, .*'model': 4.* need 12 devices, there are 8"),
        ({"data": -1, "model": 3}, r"8 devices do not divide by the other axes .*'model': 3"),
        ({"data": -1, "model": 16}, r"8 devices do not divide"),
        ({"tensor": 2}, r"unknown mesh axes \['tensor'\]; there are replica, data, pipe, seq, model"),
    ],
)
def test_errors_name_the_numbers(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(sizes)
