"""Names of chips and topologies; describing one needs libtpu and is in `tests/parity/test_rehearsal.py`."""

import pytest

from llm_jax.parallel import chips


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", None)],
)
def test_a_chip_by_its_kind(kind, name):
    assert chips.chip_of(kind) == chips.CHIPS.get(name)


def test_clocks_are_the_peaks_of_the_matrix_units():
    units = {"v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)}
    for name, (count, size) in units.items():
        chip = chips.CHIPS[name]
        assert chip.clock * count * 2 * size * size == pytest.approx(chip.flops, rel=0.01)


def test_topologies():
    assert chips.split("v5e:16x16") == ("v5e", (16, 16))
    assert chips.split("v5p:4x4x8") == ("v5p", (4, 4, 8))


@pytest.mark.parametrize("name", ["v5p-128", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "v5e:0x4", "v5e:", "h100:8"])
def test_an_unknown_topology(name):
    with pytest.raises(chips.TopologyError, match=f"topology='{name}' is none that is known: v5e:XxY"):
        chips.split(name)


def test_the_environment_comes_first(monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(chips.TopologyError, match="set .*TPU_SKIP_MDS_QUERY.* before jax is imported"):
        chips.describe("v5e:4x4")
