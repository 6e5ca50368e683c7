"""Every kind of file gives the records that it holds; a row that cannot be read is counted, and the rest is read."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_jax.data import chat, labeled, tokenizers
from llm_jax.data import records as data_records
from llm_jax.data.corpora import BadRows, CorpusError, documents
from llm_jax.data.rows import pairs
from llm_jax.data.tokens import plain_text
from llm_jax.storage import text_files

ROWS = [
    {"text": "one", "label": "a", "es": "uno"},
    {"text": 'two, "2"\n\u2028next', "label": "b", "es": "dos\x85"},
    {"text": "é 😀", "label": "a", "es": "\x0ctres"},
]
FLAT = [{**row, "text": row["text"].replace("\n", " ")} for row in ROWS]  # where a line feed ends a row


def table(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else 3
    )
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


FILES = {
    "rows.jsonl": ("".join(json.dumps(r) + "\n" for r in ROWS), ROWS),
    "raw.ndjson": ("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), ROWS),
    "list.json": (json.dumps(ROWS), ROWS),
    "indented.json": (json.dumps(ROWS, indent=2, ensure_ascii=False), ROWS),
    "data.json": (json.dumps({"version": 1, "data": ROWS}), ROWS),
    "lines.json": ("\n" + "".join(json.dumps(r) + "\n" for r in ROWS), ROWS),
    "one.json": (json.dumps(ROWS[1], indent=1), ROWS[1:2]),
    "table.csv": (table(ROWS), ROWS),
    "table.tsv": ("\n".join("\t".join(r) for r in [ROWS[0], *(r.values() for r in FLAT)]), FLAT),
}


def records(source, bad=None, **read_as):
    return [d.record for d in documents(str(source), bad, **read_as)]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_and_encoding_gives_the_same_records(name, coding, tmp_path):
    text, want = FILES[name]
    path, named = tmp_path / f"{name}.gz", coding if coding == "utf-32-be" else None
    path.write_bytes(gzip.compress(text.encode(coding)))
    bad = BadRows()
    assert records(path, bad, encoding=named) == want and bad.count == 0
    assert records(path, bad, encoding=named, layout=name.rpartition(".")[2].replace("ndjson", "jsonl")) == want
    assert [d.text for d in documents(str(tmp_path), encoding=named)] == [row["text"] for row in want]


NESTED = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "id": 1, "label": 1,
     "answers": {"text": ["hi"], "answer_start": [0]}, "ctx": "hi yo", "ask": "what", "choices": ["x", "y"]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 2, "label": 0,
     "answers": {"text": [], "answer_start": []}, "ctx": "a b", "ask": "who", "choices": ["z", "w"]},
]  # fmt: skip


def test_parquet_rows_are_used_like_those_of_json_lines(tmp_path):
    """Chats, pairs, labels, answers in nested columns, choices, groups."""
    pq.write_table(pa.Table.from_pylist(NESTED), tmp_path / "a.parquet", row_group_size=1)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in NESTED))
    tokenizer = tokenizers.train(["hi yo ab ### user assistant"], "char", 1)
    encoders = [chat.chats(tokenizer), pairs.encode_pairs(tokenizer, ("ctx", "ask")), plain_text(tokenizer)]
    reads = [
        ("classification", ("ctx", "label")), ("regression", ("ctx", "ask", "id")),
        ("choice", ("ctx", "choices", "label")),
        ("span", ("ctx", "ask", "answers.text", "answers.answer_start")),
    ]  # fmt: skip
    found = {}
    for ending in ("parquet", "jsonl"):
        path = str(tmp_path / f"a.{ending}")
        assert records(path) == NESTED
        held = list(documents(path, text_field="ctx", group="ask"))
        encoded = [list(encode(held, BadRows())) for encode in encoders]
        examples = [[e[1:] for e in labeled.read(path, *given)[0]] for given in reads]
        found[ending] = (encoded, examples, [(d.text, d.group) for d in held])
        bad = BadRows()
        assert list(plain_text(tokenizer)(list(documents(path)), bad)) == []
        fields = ", ".join(NESTED[0])
        assert bad.count == 2
        assert bad.first == f"{path}:1: no text in field 'text' (data.text_field), only {fields}"
    assert found["parquet"] == found["jsonl"] and all(map(len, found["jsonl"][0]))


def test_columns_of_objects_lack_what_a_row_lacks(tmp_path):
    """Arrow gives every object of a column all members of all rows, the others null."""
    rows = [{"call": {"city": "x"}, "calls": [{"a": 1}, {"b": [None, 2]}]}, {"call": {"unit": "c"}, "calls": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert records(str(tmp_path / "a.parquet")) == rows


def test_json_is_searched_once_a_file(tmp_path, monkeypatch):
    """For half surrogate pairs; once a row it would take time by the square of the rows."""
    seen, search = [], data_records._escapes_surrogates
    monkeypatch.setattr(data_records, "_escapes_surrogates", lambda text: seen.append(len(text)) or search(text))
    rows = [{"text": "a" * 50} for _ in range(20)]
    for name, text in {"a.json": json.dumps(rows), "b.jsonl": "".join(json.dumps(r) + "\n" for r in rows)}.items():
        (tmp_path / name).write_text(text)
        seen.clear()
        assert records(str(tmp_path / name)) == rows and sum(seen) <= len(text)


def test_lines_with_a_list_of_data_are_lines(tmp_path):
    rows = [{"data": [1], "text": "a"}, {"data": [], "text": "b"}]
    (tmp_path / "A.JSON").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert records(str(tmp_path / "A.JSON")) == rows


SENTENCES = [("Ann", "slept"), ("Bob",), ("Cy", "ate", "it")]
BEGINNINGS = {
    "conll 2003": ("-DOCSTART- -X- O\n\n", ""),
    "conll 2002": ("-DOCSTART- -DOCSTART- O\n", ""),
    "no blank line before": ("-DOCSTART- O O\n", None),
    "conll 2012": ("#begin document (bc/a); part 000\n", "#end document\n"),
}


@pytest.mark.parametrize("kind", ["conll", "conllu"])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_line_that_begins_a_document_takes_no_sentence_along(name, kind, tmp_path):
    begin, end = BEGINNINGS[name]
    row = "{} N O\n" if kind == "conll" else "1\t{}" + "\t_" * 8 + "\n"
    sentences = ["".join(row.format(word) for word in words) for words in SENTENCES]
    blank = "" if end is None else "\n"
    text = begin + sentences[0] + blank + (end or "") + begin + sentences[1] + "\n" + sentences[2]
    (tmp_path / f"a.{kind}").write_text(text)
    bad = BadRows()
    found = records(tmp_path, bad)
    assert [tuple(r["1" if kind == "conll" else "FORM"]) for r in found] == SENTENCES and bad.count == 0


def test_words_may_be_blanks_of_other_alphabets(tmp_path):
    (tmp_path / "a.conll").write_text("\u3000\tX\na\xa0b O\nc\x85d\tO\n \n\u2003 O\n", "utf-8")
    assert [r["1"] for r in records(tmp_path)] == [["\u3000", "a\xa0b", "c\x85d"], ["\u2003"]]
    (tmp_path / "a.conllu").write_text("x" + "\t_" * 9 + "\n\n1" + "\t_" * 9 + "\n")
    bad = BadRows()
    assert len(records(tmp_path / "a.conllu", bad)) == 1
    assert bad.first.endswith("a.conllu:1: the ID 'x' is not a number")


HALF = "\ud83d"
SPLIT = {  # kinds of use: records whose second one holds half a pair somewhere
    "text": ({"text": "ok"}, {"text": f"cut {HALF}"}),
    "another field": ({"text": "ok"}, {"text": "fine", "meta": {"user": [HALF]}}),
    "a name": ({"text": "ok"}, {"text": "fine", HALF: 1}),
    "chat": (NESTED[0], {"messages": [{"role": "user", "content": "\ude00"}, {"role": "assistant", "content": "b"}]}),
    "pair": ({"es": "a", "en": "b"}, {"es": "a", "en": HALF}),
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("name", SPLIT)
def test_half_a_surrogate_pair_is_a_bad_row(name, ending, tmp_path):
    good, cut = SPLIT[name]
    whole = {**good, "emoji": "\U0001f600", "escaped": "\\ud83d"}
    rows = [json.dumps(r) for r in (good, cut, whole)]
    (tmp_path / f"a.{ending}").write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    bad = BadRows()
    assert records(tmp_path, bad) == [good, whole]
    assert bad.count == 1 and f"a.{ending}:2: half a surrogate pair" in bad.first


def test_surrogates_as_bytes_are_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xed\xa0\xbd"}\n{"text": "ok"}\n')
    assert records(tmp_path) == [{"text": "ok"}]


LATIN = "t\ty\nca\xf1a\t1\n"


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.tsv", "a.csv", "a.conll", "a.json"])
def test_other_encodings_are_said_or_refused(name, tmp_path):
    """Where a row is a line of JSON the row is bad; elsewhere nothing says which other bytes are wrong too."""
    text = LATIN if "json" not in name else json.dumps([{"t": "ca\xf1a"}], ensure_ascii=False)
    (tmp_path / name).write_text(text, "utf-8")
    want = list(documents(str(tmp_path)))
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorpusError, match=r"is not UTF-8 \(.* at byte \d+\): .* \(data.encoding, --encoding\)"):
        list(documents(str(tmp_path)))
    assert list(documents(str(tmp_path), encoding="latin-1")) == want
    (replaced, *_) = documents(str(tmp_path), encoding="replace")
    assert "ca\ufffda" in (replaced.text or str(replaced.record))


def test_sources_of_python_say_their_encoding(tmp_path):
    source = "# -*- coding: latin-1 -*-\nx = 'ca\xf1a'\n"
    (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(source.replace("latin-1", "cp1252").encode("cp1252")))
    assert [d.text for d in documents(str(tmp_path))] == [source, source.replace("latin-1", "cp1252")]
    (tmp_path / "a.py").write_text("# coding: no such one\nx = 'ca\xf1a'\n", "utf-8")
    assert [d.text for d in documents(str(tmp_path / "a.py"))] == ["# coding: no such one\nx = 'ca\xf1a'\n"]


WRONG = {
    "a.json": ('[{"text": "a"}', "a.json is neither a JSON list of records nor JSON lines: "),
    "b.json": ('"a text"', "b.json holds a JSON str instead of a list of records"),
    "c.json": ('["a", 1]', r"holds no text \(2 bad rows\); the first is .*c.json:1: no JSON object"),
    "a.csv": ('id,text\n1,"a\nb\n2,c\n', "a.csv:2: a quote is opened there that is never closed"),
    "b.csv": ("text,id,text\na,1,b\n", "b.csv: the first line names 'text' twice"),
    "b.tsv": ("text\tid\ttext\na\t1\tb\n", "b.tsv: the first line names 'text' twice"),
    "c.csv": ("id,text\n", "holds no text"),
    "a.log": ("text", r"a.log does not say what it holds .* set data.layout \(--layout\) to text, jsonl, "),
    "a": ('{"text": "a"}', "a does not say what it holds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_not_what_their_name_says(name, tmp_path):
    text, message = WRONG[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message) as error:
        records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_rows_of_tables_name_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"a\n\nb"\n2\n\n3,"x"y\n4,c\n' + f'5,"{"d" * 200_000}"\n')
    bad = BadRows()
    assert [r["text"] for r in records(tmp_path, bad)] == ["a\n\nb", "c", "d" * 200_000]
    assert bad.count == 2 and bad.first.endswith("a.csv:5: 1 fields, the first line names 2")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "lines.json", "table.csv", "table.tsv", "a.conll"])
def test_a_document_comes_before_the_rest_of_its_file_is_read(name, zipped, tmp_path, monkeypatch):
    """So that a large file needs no more memory than a small one."""
    text = FILES[name][0] if name in FILES else "Ann N\n\n"
    first, _, rest = text.strip().partition("\n")
    data = f"{first}\n{rest or first}\n".encode() + f"{first}\n\n".encode() * 999
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    seen, whole = [], text_files.unpacked
    monkeypatch.setattr(text_files, "unpacked", lambda file, size: (seen.append(x) or x for x in whole(file, 64)))
    next(documents(str(path)))
    assert 0 < len(seen) < 10
