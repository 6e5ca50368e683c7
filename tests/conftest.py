"""Eight CPU devices, a compilation cache, and errors where shapes would broadcast silently."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # threads: collectives that wait must not keep a device of eight from coming

import jax
import pytest

LONGEST = ("parallel", "training", "experiments", "launch", "decoding", "objectives", "nn")  # folders, by their files
DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    """Once, before anything touches a device."""
    del config
    gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that live; looking for dead ones takes 7 %
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)  # halves compile time; numbers are tested, not speed
    cache = pathlib.Path(__file__).resolve().parents[1] / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # writing costs time too


def pytest_collection_modifyitems(items):
    """Folders of long files first: what comes last runs while other workers idle."""
    tests, last = pathlib.Path(__file__).parent, len(LONGEST)
    folder = lambda item: item.path.relative_to(tests).parts[0]
    items.sort(key=lambda item: LONGEST.index(folder(item)) if folder(item) in LONGEST else last)


@pytest.fixture
def shared_data():
    """The folder of small real data sets; the test is skipped, saying so, where it is absent."""
    if not DATA.exists():
        pytest.skip(f"no shared data at {DATA}")
    return DATA
