"""The token cache: exact contents, reuse without rewriting, keyed by everything that matters, rebuilt when damaged."""

import json
import os
import threading
import time

import numpy as np
import pytest

from llm_jax.data import tokenizers, tokens
from llm_jax.data.chat import chats
from llm_jax.data.corpora import CorpusError, Document, documents, split_of
from llm_jax.data.tokenizers import Tokenizer, TokenizerError
from llm_jax.data.tokens import EncodedDocument
from llm_jax.storage import digests

LINES = [f"document {i} é" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(LINES, "char", 1)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "other": t[::-1]}) for t in LINES))
    return str(path)


def stamp(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


def test_holds_every_document_of_its_split(source, tokenizer, tmp_path):
    stores = tokens.build(source, tokenizer, tmp_path / "cache", validation_share=0.3)
    assert min(len(s.starts) for s in stores.values()) > 2
    for name, store in stores.items():
        chosen = [d.text for d in documents(source) if split_of(d, 0.3) == name]
        assert [store.ids[a:b].tolist() for a, b in zip(store.starts, store.starts[1:], strict=False)] == [
            [*tokenizer.encode(t), tokenizer.eos_id] for t in chosen
        ]
        assert store.text_bytes == sum(len(t.encode()) for t in chosen)
        assert store.weights is None and store.ids.dtype == np.uint16


def test_the_tail_of_every_document(source, tokenizer, tmp_path):
    stores = tokens.build(source, tokenizer, tmp_path / "cache", validation_share=0.25, split="tail")
    text = {n: [tokenizer.decode(s.ids[a:b]) for a, b in zip(s.starts, s.starts[1:], strict=False)]
            for n, s in stores.items()}  # fmt: skip
    for line, head, tail in zip(LINES, text["train"], text["validation"], strict=True):
        assert head + tail == line and len(head) == round(0.75 * len(line))


def test_an_empty_tail_is_no_bad_row(source, tokenizer, tmp_path, caplog):
    stores = tokens.build(source, tokenizer, tmp_path / "cache", validation_share=0.0, split="tail")
    assert len(stores["train"].starts) == 41 and len(stores["validation"].ids) == 0
    assert "bad row" not in caplog.text


def test_a_cache_is_reused_and_keyed_by_what_matters(source, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    calls = []

    def encode(batch, bad):
        calls.append(len(batch))
        return [EncodedDocument(tokenizer.encode(d.text), [0] + [1] * (len(d.text) - 1)) for d in batch]

    build = lambda **changes: tokens.build(
        **{"source": source, "tokenizer": tokenizer, "cache": cache, "encode": encode, **changes}
    )
    first = build()
    before, seen = stamp(cache), len(calls)
    again = build()
    assert stamp(cache) == before and len(calls) == seen
    np.testing.assert_array_equal(again["train"].ids, first["train"].ids)
    np.testing.assert_array_equal(again["train"].weights, [w for t in LINES for w in [0] + [1] * (len(t) - 1)])
    changes = [
        {"tokenizer": tokenizers.train(LINES[:20], "char", 1)},
        {"tokenizer": Tokenizer(tokenizer.backend, None, [1])},
        {"tokenizer": Tokenizer(tokenizer.backend, None, tokenizer.eos_ids, "{{ a }}")},
        {"validation_share": 0.5},
        {"kind": "chat"},
        {"text_field": "other"},
        {"encoding": "latin-1"},
        {"split": "tail", "encode": None, "validation_share": 0.5},
    ]
    for i, change in enumerate(changes):
        build(**change)
        assert len(list(cache.iterdir())) == 2 + i, change
    with open(source, "a") as f:
        f.write("\n" + json.dumps({"text": "one more"}))
    assert len(build()["train"].starts) == len(first["train"].starts) + 1
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("suffix", ["ids", "weights", "starts", "json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "replace"])
def test_a_damaged_cache_is_built_again(suffix, damage, source, tokenizer, tmp_path, caplog):
    encode = lambda batch, bad: [EncodedDocument(tokenizer.encode(d.text), [1] * len(d.text)) for d in batch]
    good = tokens.build(source, tokenizer, tmp_path / "cache", encode=encode)["train"]
    good = [np.array(good.ids), np.array(good.starts), np.array(good.weights), good.text_bytes]
    (file,) = (tmp_path / "cache").rglob(f"train.{suffix}")
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        flipped = bytearray(data)
        flipped[data.rindex(b"1") if suffix == "json" else len(data) // 2] ^= 1
        file.write_bytes({"truncate": data[:-1], "flip": bytes(flipped), "replace": b"[]"}[damage])
    again = tokens.build(source, tokenizer, tmp_path / "cache", encode=encode)["train"]
    for a, b in zip(good, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert ("damaged" in caplog.text) == (damage != "remove")
    assert file.read_bytes() == data


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were hashed since the last look."""
    seen, whole = [], digests.digest_file

    def look():
        found = sorted(seen)
        seen.clear()
        return found

    monkeypatch.setattr(digests, "digest_file", lambda path, *a, **k: seen.append(path.name) or whole(path, *a, **k))
    return look


EVERYTHING = sorted(
    ["rows.jsonl", *(f"{s}.{x}" for s in ("train", "validation") for x in ("ids", "starts", "weights"))]
)


def test_a_start_hashes_what_may_have_changed_and_no_more(source, tokenizer, tmp_path, reads, monkeypatch):
    """What may have changed is told by sizes and times, by a restart of the machine, or on request."""
    build = lambda **more: tokens.build(source, tokenizer, tmp_path / "cache", validation_share=0.3, **more)["train"]
    first = build()
    assert reads() == EVERYTHING
    before = stamp(tmp_path / "cache")
    build()
    tokens.build(source, tokenizer, tmp_path / "cache", validation_share=0.5)  # another cache of the same source
    assert "rows.jsonl" not in reads()
    os.utime(source)
    build()
    assert reads() == ["rows.jsonl"]  # the same content: nothing is built, and the new time is stored
    again = build()
    assert reads() == [] and len(list((tmp_path / "cache").iterdir())) == 2
    assert {p for p, s in stamp(tmp_path / "cache").items() if before.get(p, s) != s} == {
        p for p in before if p.name == "checked.json"
    }
    np.testing.assert_array_equal(again.ids, first.ids)
    build(verify=True)
    assert reads() == EVERYTHING
    monkeypatch.setattr(digests, "_boot", lambda: "after a crash")
    build()
    assert reads() == EVERYTHING
    build()
    assert reads() == []
    (file,) = (p for p in before if p.name == "checked.json")
    file.write_text("{}")  # as one of a version without it
    build()
    assert reads() == EVERYTHING


def test_a_change_that_keeps_size_and_time_is_noticed(source, tokenizer, tmp_path, caplog):
    build = lambda: tokens.build(source, tokenizer, tmp_path / "cache")["train"]
    first = np.array(build().ids)

    def exchange(path, old, new):
        times = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        os.utime(path, ns=(times, times))

    exchange(type(tmp_path)(source), b"document 7 ", b"document 8 ")
    assert (build().ids != first).sum() == 1
    (ids,) = {p for p in (tmp_path / "cache").rglob("train.ids") if not (np.fromfile(p, np.uint16) != first).any()}
    exchange(ids, ids.read_bytes()[:2], b"\0\0")
    exchange(type(tmp_path)(source), b"document 8 ", b"document 7 ")
    np.testing.assert_array_equal(build().ids, first)
    assert "train.ids does not match its checksum" in caplog.text


def test_a_source_that_grows_while_it_is_read_is_no_cache(source, tokenizer, tmp_path):
    def encode(batch, bad):
        with open(source, "a") as f:
            f.write("\n" + json.dumps({"text": "one more"}))
        return [EncodedDocument(tokenizer.encode(d.text)) for d in batch]

    with pytest.raises(CorpusError, match="rows.jsonl changed while it was tokenized: run again"):
        tokens.build(source, tokenizer, tmp_path / "cache", encode=encode)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_the_smallest_type_that_holds_them(size, dtype, source, tokenizer, tmp_path):
    class Sized(Tokenizer):
        vocab_size = size

    large = Sized(tokenizer.backend, None, [size - 1])
    ids = tokens.build(source, large, tmp_path / "cache")["train"].ids
    assert ids.dtype == dtype and (ids == size - 1).sum() == len(LINES)


def test_errors_are_one_line(source, tokenizer, tmp_path):
    (tmp_path / "no_text.jsonl").write_text('{"body": "a"}\n{"body": "b"}')
    tail = {"split": "tail", "encode": chats(tokenizer)}
    rows = [
        (lambda: tokens.build(str(tmp_path / "no_text.jsonl"), tokenizer, tmp_path), CorpusError, "(2 bad rows)"),
        (
            lambda: tokens.build(str(tmp_path / "no_text.jsonl"), tokenizer, tmp_path, text_field="body2"),
            CorpusError,
            "no_text.jsonl:1: no text in field 'body2' (data.text_field), only body",
        ),
        (lambda: tokens.build("/none", tokenizer, tmp_path), CorpusError, "no corpus at '/none'"),
        (lambda: tokens.build(source, tokenizer, tmp_path, split="head"), CorpusError, "neither hash nor tail"),
        (lambda: tokens.build(source, tokenizer, tmp_path, 0.1, **tail), CorpusError, "need data.split=hash"),
        (lambda: tokens.check_vocabulary(tokenizer, 5), TokenizerError, f"has {tokenizer.vocab_size} entries"),
    ]
    for call, kind, message in rows:
        with pytest.raises(kind) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    tokens.check_vocabulary(tokenizer, tokenizer.vocab_size)
    assert split_of(Document("a", "x"), 0.0) == "train"


def test_who_waits_for_a_cache_says_so_and_reads_it(source, tokenizer, tmp_path, monkeypatch, caplog):
    cache, builds, write = tmp_path / "cache", [], tokens._write

    def build(*args):
        """While one process builds it another one waits, and builds nothing."""
        builds.append(threading.Thread(target=tokens.build, args=(source, tokenizer, cache)))
        if len(builds) == 1:
            builds[0].start()
            while "waiting for another process that fills the token cache" not in caplog.text:
                time.sleep(0.01)
        write(*args)

    monkeypatch.setattr(tokens, "_write", build)
    with caplog.at_level("INFO"):
        tokens.build(source, tokenizer, cache)
        builds[0].join()
    assert len(builds) == 1 and len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_a_cache_is_read_where_nothing_can_be_written(source, tokenizer, tmp_path, monkeypatch):
    made = tokens.build(source, tokenizer, tmp_path / "cache")["train"]

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tokens.locks, "hold", refuse)
    found = tokens.build(source, tokenizer, tmp_path / "cache")["train"]
    np.testing.assert_array_equal(found.ids, made.ids)
    tokens.build(source, tokenizer, tmp_path / "other")  # and one is built where there are no locks


def test_what_cannot_be_tokenized_leaves_nothing_behind(source, tokenizer, tmp_path):
    (tmp_path / "z.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(CorpusError, match="is not UTF-8"):
        tokens.build(f"{source},{tmp_path}/z.txt", tokenizer, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_half_a_character_is_said(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda t: tokenizer.encode_batch([t])):
        with pytest.raises(TokenizerError, match="the text holds half a surrogate pair, which is not a character"):
            encode("\ud83d hello")
