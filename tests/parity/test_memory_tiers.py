"""Parameters of layers in host memory: more families than `tests/parallel/memory` has."""

import borrowed
import pytest

offload = borrowed.module("parallel/memory/test_offload.py")


@pytest.mark.parametrize("name", ["t5", "xlnet"])
def test_parameters_of_many_devices(name):
    offload.test_parameters_of_many_devices(name, {"data": 8})
