"""Live comparisons with torch, transformers and peft; skipped as a whole where those are not installed."""

import jax
import pytest

pytest.importorskip("torch", reason="parity needs torch: make parity")
pytest.importorskip("transformers", reason="parity needs transformers: make parity")
jax.config.update("jax_disable_most_optimizations", False)  # here the compiler runs as it does for users
