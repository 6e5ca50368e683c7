"""A stored digest stands for a file while nothing says that it changed, and never longer."""

import os
import shutil

import pytest

from llm_jax.storage import digests
from llm_jax.storage.digests import digest_file, digest_files, load, save


@pytest.fixture
def reads(monkeypatch):
    """Paths of files that were read."""
    seen = []
    whole = digests.digest_file
    monkeypatch.setattr(digests, "digest_file", lambda path, *rest: seen.append(str(path)) or whole(path, *rest))
    return seen


def rewritten(path):
    path.write_text("abd")


def kept_times(path):
    """Another content under the old size and mtime, as `cp -p` and `rsync -t` leave it."""
    before = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(path):
    other = path.with_name("other")
    other.write_text("abd")
    shutil.copystat(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [rewritten, kept_times, exchanged])
def test_a_change_is_noticed_whatever_it_keeps(change, tmp_path, reads):
    path = tmp_path / "a"
    path.write_text("abc")
    known = digest_files([path])
    change(path)  # at once: within a tick of the clock of the file system
    again = digest_files([path], known)
    assert again[str(path)].digest != known[str(path)].digest and len(reads) == 2


def test_what_did_not_change_is_not_read(tmp_path, reads, monkeypatch):
    path = tmp_path / "a"
    path.write_text("abc")
    known = digest_files([path])
    assert digest_files([path], known) == known and len(reads) == 1
    os.utime(path)  # touched: read again, and the same
    touched = digest_files([path], known)
    assert touched[str(path)].digest == known[str(path)].digest and len(reads) == 2
    assert digest_files([path], touched) == touched and len(reads) == 2
    for boot in ("another start", ""):  # after a restart, or where starts cannot be told apart
        monkeypatch.setattr(digests, "_boot", lambda boot=boot: boot)
        digest_files([path], digest_files([path], touched))
    assert len(reads) == 5  # once after the restart, always without


def test_what_is_stored(tmp_path):
    (tmp_path / "a").write_text("abc")
    known = {"a": digest_file(tmp_path / "a"), "b": digest_file(tmp_path / "a", 16)}
    assert len(known["b"].digest) == 32
    file = tmp_path / "checked.json"
    assert load(file) == {}
    save(file, known)
    assert load(file) == known and sorted(p.name for p in tmp_path.iterdir()) == ["a", "checked.json"]
    for damaged in ("", "[]", '{"a": 1}', '{"a": [1, 2, 3, 4]}', '{"a": ["1", 2, 3, "", ""]}'):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="checked.json is damaged"):
            load(file)
    assert not known["a"].is_current(tmp_path / "missing")
