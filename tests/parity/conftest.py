"""Live comparisons with torch, transformers and peft; skipped as a whole where those are not installed."""

import jax
import pytest

pytest.importorskip("torch", reason="parity needs torch: make parity")
pytest.importorskip("transformers", reason="parity needs transformers: make parity")


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Here the compiler runs as it does for users; the other tests of the same process keep their setting."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
