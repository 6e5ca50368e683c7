"""Live comparisons with torch, transformers and peft; skipped as a whole where those are not installed."""

import pytest

pytest.importorskip("torch", reason="parity needs torch: make parity")
pytest.importorskip("transformers", reason="parity needs transformers: make parity")
