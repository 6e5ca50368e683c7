"""Fewer devices than the eight that tests have, for runs that say nothing of sharding."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Runs begun in here have a mesh of one device, whose programs compile in less time."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield
