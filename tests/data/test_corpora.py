"""Documents come out of every format whole and in order; what cannot be read is one clear line or a counted row."""

import gzip
import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llm_jax.data.corpora import (
    BadRows,
    CorpusError,
    Document,
    documents,
    file_digests,
    find_files,
    fingerprint,
    split_of,
)

ROWS = [{"text": "one\n"}, {"text": "two é 😀"}, {"text": "three"}]
TEXTS = [r["text"] for r in ROWS]
JSONL = "\n".join(json.dumps(r) for r in ROWS).encode() + b"\n"
zst = lambda data: zstandard.ZstdCompressor().compress(data)
cut = JSONL.index(b"\n") + 1


def parquet(path):
    pq.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), path)


WRITERS = {
    "rows.jsonl": lambda p: p.write_bytes(JSONL),
    "rows.ndjson": lambda p: p.write_bytes(JSONL),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL)),
    "members.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL[:cut]) + gzip.compress(JSONL[cut:])),
    "rows.jsonl.zst": lambda p: p.write_bytes(zst(JSONL)),
    "frames.jsonl.zst": lambda p: p.write_bytes(zst(JSONL[:cut]) + zst(JSONL[cut:])),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    for source in (tmp_path / name, tmp_path, tmp_path / "*s.*"):
        found = list(documents(str(source)))
        assert [d.text for d in found] == TEXTS
        assert [d.name for d in found] == [f"{tmp_path / name}:{i}" for i in (1, 2, 3)]


def test_sources_of_files(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "sub/a.md": "A", "c.png": "C", "empty.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"Z"))
    read = lambda source: [d.text for d in documents(source)]
    assert read(str(tmp_path)) == ["B", "A", "Z"]  # sorted by path; the picture and the blank file are not text
    assert "files of unknown kinds left out" in caplog.text and "1 (c.png)" in caplog.text
    assert read(f"{tmp_path}/**/*.md") == ["A"]
    assert read(f"{tmp_path}/sub,{tmp_path}/b.txt,{tmp_path}/b.txt") == ["B", "A"]
    for source in (f"{tmp_path}/c.png", f"{tmp_path}/*"):  # what is named is read or refused
        with pytest.raises(CorpusError, match=r"the name of .*c.png does not say what it holds .* set data.layout"):
            read(source)
    assert [d.text for d in documents(f"{tmp_path}/c.png", layout="text")] == ["C"]
    assert [d.text for d in documents(str(tmp_path), layout="text")] == ["B", "C", "A", "Z"]
    library = [str(p) for p in find_files("stdlib")]
    assert any(p.endswith("json/decoder.py") for p in library) and not any("/test/" in p for p in library)


BROKEN = {
    "missing.txt": (None, "no corpus at"),
    "nothing*.txt": (None, "matches no readable file"),
    "": (None, "empty path"),
    "a.txt,": (b"text", "empty path"),
    "empty.txt": (b"", "holds no text"),
    "empty.jsonl": (b"\n\n", "holds no text"),
    "bad.jsonl": (b"[1]\nnope\n", "holds no text (2 bad rows)"),
    "text.jsonl.gz": (b"not compressed", "cannot be decompressed"),
    "cut.jsonl.gz": (gzip.compress(JSONL)[:-9], "cannot be decompressed"),
    "text.jsonl.zst": (b"not compressed", "cannot be decompressed"),
    "cut.jsonl.zst": (zst(JSONL)[:-3], "cannot be decompressed: it is cut short"),
    "bad.parquet": (b"PAR1 nonsense", "not a readable Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = BROKEN[name]
    if data is not None:
        (tmp_path / name.rstrip(",")).write_bytes(data)
    with pytest.raises(CorpusError) as error:
        list(documents(name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_rows_are_counted_and_the_rest_is_read(tmp_path, caplog):
    lines = [b'{"text": "good"}', b"{", b"\xff\xfe", b"3", b"[" * 100_000, b'{"other": 1}', b'{"text": 5}', b""]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.table({"text": ["x", None, "y"]}), tmp_path / "b.parquet")
    bad = BadRows()
    found = list(documents(str(tmp_path), bad))
    assert bad.count == 4  # lines without an object
    assert [d.text for d in found] == ["good", "", "", "x", "", "y"]  # a record without text may have other uses
    assert found[1].record == {"other": 1}
    assert len([r for r in caplog.records if "skipping bad row" in r.message]) == 3  # the first few
    assert "4 bad rows skipped" in caplog.text


def test_split_depends_on_content_only_and_has_its_share():
    rng = random.Random(0)
    texts = [f"document {i} {rng.random()}" for i in range(4000)]
    held = {t for t in texts if split_of(Document("a", t), 0.1) == "validation"}
    assert held == {t for t in reversed(texts) if split_of(Document("renamed", t), 0.1) == "validation"}
    deviation = math.sqrt(len(texts) * 0.1 * 0.9)
    assert abs(len(held) - 400) < 4 * deviation
    assert held <= {t for t in texts if split_of(Document("a", t), 0.3) == "validation"}  # a larger share adds only
    assert all(split_of(Document("a", t), 0.0) == "train" for t in texts[:50])
    records = [Document("r", "", {"n": i, "m": 1}) for i in range(2000)]
    held_records = [d for d in records if split_of(d, 0.5) == "validation"]
    assert abs(len(held_records) - 1000) < 4 * math.sqrt(500)
    swapped = Document("s", "", dict(reversed(held_records[0].record.items())))
    assert split_of(swapped, 0.5) == "validation"
    split_of(Document("a", "\ud800"), 0.5)  # a lone surrogate from JSON is hashed too


def test_fingerprint_follows_names_and_contents(tmp_path):
    of = lambda source: fingerprint(file_digests(str(source)))
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = of(path)
    assert of(path) == first
    path.write_text("two")
    changed = of(path)
    path.write_text("one")
    path.rename(tmp_path / "b.txt")
    assert len({first, changed, of(tmp_path)}) == 3
