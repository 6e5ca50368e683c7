"""Live comparisons with torch, transformers and peft; skipped as a whole where those are not installed."""

import jax
import pytest

pytest.importorskip("torch", reason="parity needs torch: make parity")
pytest.importorskip("transformers", reason="parity needs transformers: make parity")


LONG = ("test_matrix", "test_rehearsal")  # begun first: what begins last runs while another worker idles


@pytest.hookimpl(tryfirst=True)  # before the workers read the groups
def pytest_collection_modifyitems(items):
    """A worker takes a whole file, of the matrix what belongs to one model, whose run on one device is made once."""
    for item in items:
        if "parity" not in item.path.parts:
            continue
        call = getattr(item, "callspec", None)
        model = call.params.get("model", "") if call and item.path.stem == "test_matrix" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {model}"))
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Here the compiler runs as it does for users; the other tests of the same process keep their setting."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
