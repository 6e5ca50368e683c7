"""Labelled examples come out of every layout; a row that is none is counted, and named where nothing is left."""

import gzip
import json
import logging

import pytest

from llm_jax.data import corpora
from llm_jax.data.corpora import BadRows, CorpusError
from llm_jax.data.labeled import FIELDS, Example, check_fields, names_of, read

CONLLU = """# text = I don't
1\tI\t_\tPRON\t_\t_\t2\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\t_\tAUX\t_\t_\t0\troot\t_\t_
3\tn't\t_\tPART\t_\t_\t2\tadvmod\t_\t_
3.1\tgo\t_\tVERB\t_\t_\t_\t_\t_\t_

# newpar
1\tYes\t_\tINTJ\t_\t_\t0\troot\t_\t_
"""
TAGGED = "#one\tB\nx\tO\n\t\n-DOCSTART- -X-\n\nlast I-B\n"
SPANS = [
    {"id": 1, "context": "Ann slept.", "question": "Who?", "answers": {"text": ["Ann", "A"], "answer_start": [0, 0]}},
    {"id": 2, "context": "Ann slept.", "question": "Where?", "answers": {"text": [], "answer_start": []}},
]
CHOICES = [{"ctx": "a", "endings": ["b", "c"], "label": 1}, {"ctx": "d", "endings": ["e", "f"], "label": 0}]
lines = lambda rows: "".join(json.dumps(r) + "\n" for r in rows)

# file, its contents, kind, fields, layout, (inputs, label) of every example
LAYOUTS = {
    "table": ("a.tsv", "label\ttext\n1\tgood\n0\tbad \"x\n", "classification", ("text", "label"), None,
              [(("good",), "1"), (('bad "x',), "0")]),
    "table by another name, CRLF": ("a.txt", "s\tt\tn\r\nx\ty\t1.5\r\n", "regression", ("s", "t", "n"), "tsv",
                                    [(("x", "y"), 1.5)]),
    "json": ("a.jsonl", lines([{"t": "x", "y": True}, {"t": "z", "y": 3}]), "classification", ("t", "y"), None,
             [(("x",), "True"), (("z",), "3")]),
    "expression": ("a.train", "A:b what is it\nB:c no\n", "classification", ("t", "y"), r"(?P<y>\w+):\S+ (?P<t>.*)",
                   [(("what is it",), "A"), (("no",), "B")]),
    "words in json": ("a.jsonl", lines([{"w": ["a", "b"], "t": [3, "O"]}]), "tokens", ("w", "t"), None,
                      [(("a", "b"), ["3", "O"])]),
    "conll": ("a.conll", TAGGED, "tokens", ("1", "2"), None, [(("#one", "x"), ["B", "O"]), (("last",), ["I-B"])]),
    "conllu": ("a.conllu", CONLLU, "tokens", ("FORM", "UPOS"), None,
               [(("I", "do", "n't"), ["PRON", "AUX", "PART"]), (("Yes",), ["INTJ"])]),
    "spans": ("a.jsonl", lines(SPANS), "span", ("context", "question", "answers.text", "answers.answer_start"), None,
              [(("Who?", "Ann slept."), (0, 3)), (("Where?", "Ann slept."), None)]),
    "choices": ("a.jsonl", lines(CHOICES), "choice", ("ctx", "endings", "label"), None,
                [(("a", "b", "c"), "1"), (("d", "e", "f"), "0")]),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, zipped, tmp_path):
    file, text, kind, fields, layout, want = LAYOUTS[name]
    path = tmp_path / (file + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    train, held = read(str(path), kind, fields, layout=layout)
    assert [(e.inputs, e.label) for e in train] == want and held == []
    assert train[0].name.startswith(f"{path}:")


def test_names_say_the_line(tmp_path):
    (tmp_path / "a.conllu").write_text(CONLLU)
    train, _ = read(str(tmp_path / "a.conllu"), "tokens", ("FORM", "UPOS"))
    assert [e.name.rpartition(":")[2] for e in train] == ["2", "9"]
    (document, _) = corpora.documents(str(tmp_path))  # a treebank is a corpus too
    assert document.text == "I do n't"


def test_labels_are_sorted():
    make = lambda *labels: [Example("", (), label) for label in labels]
    assert names_of(make("b", "a", "b"), "classification", ("t", "y")) == ("a", "b")
    assert names_of(make("10", "2", "0"), "choice", ("t", "c", "y")) == ("0", "2", "10")
    assert names_of(make(["X", "A"], ["B"]), "tokens", ("1", "2")) == ("A", "B", "X")
    assert names_of(make(1.0), "regression", ("t", "score")) == ("score",)
    assert names_of(make(None), "span", ("c", "q", "a", "s")) == ("start", "end")


BAD = {
    "a missing field": ("t\ty\nx\t1\n", "classification", ("t", "z"), "a.tsv:2: no field 'z', only t, y"),
    "no text": ("t\ty\n \t1\n", "classification", ("t", "y"), "a.tsv:2: field 't' holds no text"),
    "no label": ("t\ty\nx\t \n", "classification", ("t", "y"), "a.tsv:2: field 'y' holds no label"),
    "no number": ("t\ty\nx\tmuch\n", "regression", ("t", "y"), "could not convert string to float: 'much'"),
    "no finite number": ("t\ty\nx\tnan\n", "regression", ("t", "y"), "'nan' is not a finite number"),
    "words in a text": ("t\ty\nx\ta\n", "tokens", ("t", "y"), "0 words and 0 tags"),
    "a wrong offset": ("c\tq\ta\ts\nAnn\twho\tAnn\t1\n", "span", tuple("cqas"), "'Ann' does not stand at character 1"),
    "a negative offset": ("c\tq\ta\ts\nAnn\twho\tn\t-1\n", "span", tuple("cqas"), "does not stand at character -1"),
    "a list in the place of a text": ('{"t": ["x", "z"], "y": 1}\n', "classification", ("t", "y"), "holds no text"),
    "no offset": ("c\tq\ta\ts\nAnn\twho\tn\tx\n", "span", tuple("cqas"), "invalid literal for int"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_named(name, tmp_path):
    text, kind, fields, message = BAD[name]
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(CorpusError) as e:
        read(str(tmp_path / "a.tsv"), kind, fields, layout="jsonl" if text.startswith("{") else None)
    assert message in str(e.value) and "1 bad rows" in str(e.value) and "\n" not in str(e.value)


def test_bad_rows_among_good_ones_are_counted(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text("t\ty\nx\t1\n\t2\ntoo\tmany\tfields\nz\t1\n")
    with caplog.at_level(logging.WARNING):
        train, _ = read(str(tmp_path / "a.tsv"), "classification", ("t", "y"))
    assert len(train) == 2 and "2 bad rows skipped" in caplog.text and "a.tsv:4: 3 fields" in caplog.text
    bad = BadRows()
    (tmp_path / "a.conllu").write_text(CONLLU + "\n1\tx\n\n")
    assert len(list(corpora.documents(str(tmp_path / "a.conllu"), bad))) == 2 and bad.count == 1
    (tmp_path / "a.x").write_text("A b\nnothing\n")
    assert len(list(corpora.documents(str(tmp_path / "a.x"), bad, layout=r"(?P<y>\w) (?P<t>.*)"))) == 1
    assert bad.count == 2


def test_parts(tmp_path):
    (tmp_path / "a.tsv").write_text("t\ty\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(200)))
    (tmp_path / "b.tsv").write_text("t\ty\nother\t7\n")
    source, other = str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")
    train, held = read(source, "classification", ("t", "y"), share=0.2)
    assert 20 < len(held) < 60 and len(train) + len(held) == 200
    whole, held = read(source, "classification", ("t", "y"), validation=other, share=0.2)
    assert len(whole) == 200 and [e.label for e in held] == ["7"]
    (tmp_path / "b.tsv").write_text("t\ty\nother\tx\n")
    with pytest.raises(CorpusError, match="b.tsv' holds no row with a text, perhaps a second one, and the number"):
        read(source, "regression", ("t", "y"), validation=other)


@pytest.mark.parametrize(
    "kind, fields, layout, message",
    [
        ("classification", ("t",), None, r"data.fields=\('t',\) must name a text, perhaps a second one, and the label"),
        ("span", ("a", "b"), None, "must name the context, the question, the answer and where it starts"),
        ("multi_label", ("a", "b"), None, "kind='multi_label' cannot be read from files, only classification"),
        ("tokens", ("1", "2"), "(", "data.layout='\\(' is not a regular expression"),
        (
            "tokens",
            ("1", "2"),
            "xls",
            "data.layout='xls' is not one of text, jsonl, .*, parquet and has no named group",
        ),
    ],
)
def test_wrong_settings(kind, fields, layout, message, tmp_path):
    (tmp_path / "a.tsv").write_text("t\ty\nx\t1\n")
    with pytest.raises(CorpusError, match=message):
        read(str(tmp_path / "a.tsv"), kind, fields, layout=layout)
    assert [check_fields(k, ["x"] * n) for k, n in zip(FIELDS, (2, 3, 2, 4, 5), strict=True)] == [None] * 5


COUNTS = {  # of the description of the data: (kind, fields, layout, train, held, labels)
    "sst2": (("train.tsv", "dev.tsv"), "classification", ("sentence", "label"), None, 6920, 872, 2),
    "trec": (("TREC.train", "TREC.test"), "classification", ("t", "y"), r"(?P<y>\w+):\S+ (?P<t>.*)", 5452, 500, 6),
    "sick": (("SICK_train.txt", "SICK_test_annotated.txt"), "classification",
             ("sentence_A", "sentence_B", "entailment_judgment"), "tsv", 4500, 4927, 3),
    "wnut17": (("wnut17train.conll", "emerging.test.annotated"), "tokens", ("1", "2"), "conll", 3394, 1287, 13),
    "ud_ewt": (("en_ewt-ud-dev.conllu.gz", "en_ewt-ud-test.conllu.gz"), "tokens", ("FORM", "UPOS"), None, 2001, 2077,
               17),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_real_sets_have_the_rows_that_their_description_counts(name, shared_data):
    (train, held), kind, fields, layout, *want = COUNTS[name]
    folder = shared_data / name
    encoding = "latin-1" if name == "trec" else None
    found = read(str(folder / train), kind, fields, str(folder / held), layout=layout, encoding=encoding)
    assert [len(found[0]), len(found[1]), len(names_of(found[0], kind, fields))] == want
    if kind == "tokens":
        assert sum(len(e.inputs) for e in found[1]) == {"wnut17": 23394, "ud_ewt": 25094}[name]
