"""Arrays in files, and reading ahead."""

import errno
import os
import threading

import numpy as np
import pytest

from llm_jax.storage.mapped import Ahead, Declared, MappedArrays


def test_the_next_entry_is_read_while_this_one_is_used():
    began: list[tuple[str, int]] = []
    wake = threading.Condition()

    def read(path, number):
        with wake:
            began.append((path, number))
            wake.notify_all()
        return path, number

    def has_begun(path, number):
        with wake:
            return wake.wait_for(lambda: began and began[-1] == (path, number), timeout=10)

    a, b = "encoder", "decoder"
    ahead = Ahead(read, {a: 2, b: 2})
    assert ahead(a, 0) == (a, 0) and has_begun(a, 1)
    assert ahead(a, 1) == (a, 1) and has_begun(a, 0)  # a guess
    assert ahead(b, 0) == (b, 0) and has_begun(b, 1)
    assert ahead(b, 1) == (b, 1) and has_begun(b, 0)
    assert ahead(a, 0) == (a, 0) and has_begun(a, 1)
    count = len(began)
    assert ahead(a, 1) == (a, 1) and has_begun(b, 0)  # what followed the last time
    assert len(began) == count + 1  # and what was read ahead is not read again


def test_an_entry_alone_is_not_read_ahead_of_its_writing():
    value = [1]
    ahead = Ahead(lambda group, number: value[0], {"all": 1})
    assert ahead("all", 0) == 1
    value[0] = 2
    assert ahead("all", 0) == 2


def test_arrays_in_files(tmp_path):
    arrays = MappedArrays(
        tmp_path / "scratch", {"a/b": Declared((3, 2), np.dtype("f4")), "c": Declared((2,), np.dtype("f8"))}
    )
    arrays.fill("a/b", np.arange(6).reshape(3, 2))
    arrays.fill("c")
    arrays["a/b"][1] = 7
    assert list(arrays) == ["a/b", "c"] and arrays["a/b"].dtype == np.float32
    np.testing.assert_array_equal(arrays["a/b"], [[0, 1], [7, 7], [4, 5]])
    np.testing.assert_array_equal(np.load(tmp_path / "scratch" / "a" / "b.npy"), arrays["a/b"])
    np.testing.assert_array_equal(arrays["c"], [0, 0])
    with pytest.raises(ValueError, match="cannot be memory-mapped in gs://bucket: take a local folder"):
        MappedArrays("gs://bucket", {})
    arrays.remove()
    assert not (tmp_path / "scratch").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arrays = MappedArrays(tmp_path, {"a": Declared((1000,), np.dtype("f4"))})
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 4,128 bytes \(No space left on device\): .*a\.npy"):
        arrays.fill("a", np.ones(1000))
