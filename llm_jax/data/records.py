"""Reads the documents of one file; its extension names the kind: text, JSON, JSON lines, tables, CoNLL, Parquet.

Every kind with fields (JSON, tables, Parquet) gives records of the same shape, so whatever reads one kind reads all.
A row that cannot be read is counted and reported, and the other rows are read. Parquet and files with one row per line
are read in pieces; plain text and `.json` as a whole.
"""

import csv
import dataclasses
import io
import itertools
import json
import logging
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llm_jax.storage.text_files import BLOCK, TextFile, TextFileError

log = logging.getLogger(__name__)

ENDINGS = {
    **dict.fromkeys((".txt", ".md", ".py", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **{f".{kind}": kind for kind in ("json", "csv", "tsv", "conll", "conllu", "parquet")},
}
CONLLU = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
NOT_WORDS = re.compile(r"\d+[-.]\d+")  # IDs of CoNLL-U's multiword tokens and empty nodes
DOCUMENTS = ("#begin document", "#end document")  # lines of CoNLL 2011 and 2012
ROWS = 256  # rows of a Parquet file that are read at a time


class CorpusError(ValueError):
    """A corpus that cannot be read, or holds nothing."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      name: where it came from, `path` or `path:line`.
      text: its text; for records of another shape, the empty string.
      record: the fields of a structured row (JSON object, line of a table; columns of a CoNLL sentence), else None.
      group: documents of one group are held out together; None for a group of its own.
    """

    name: str
    text: str
    record: dict[str, Any] | None = None
    group: str | None = None


class BadRows:
    """Counts rows that had to be skipped; the first few are logged.

    Attributes:
      count: number of bad rows.
      first: name of the first bad row and what is wrong with it.
    """

    def __init__(self) -> None:
        """Starts without bad rows."""
        self.count, self.first = 0, ""

    def add(self, name: str, why: str) -> None:
        """Counts one bad row; `why` says what is wrong with it."""
        self.count += 1
        self.first = self.first or f"{name}: {why}"
        if self.count <= 3:
            log.warning("skipping bad row %s: %s", name, why)

    def __str__(self) -> str:
        """The number of bad rows, and the first one with its reason."""
        return f"({self.count} bad rows)" + (f"; the first is {self.first}" if self.first else "")


def kind_of(path: epath.Path) -> str | None:
    """The key of `READERS` for a file's extension (before `.gz` or `.zst`); None if it is unknown."""
    return ENDINGS.get(_ending(path))


def _ending(path: epath.Path) -> str:
    return epath.Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def read_file(
    path: epath.Path, bad: BadRows, text_field: str = "text", layout: str | None = None, encoding: str | None = None
) -> Iterator[Document]:
    """Yields the documents of one file.

    Args:
      path: the file.
      bad: counts rows that are skipped.
      text_field: field of records that holds the text.
      layout: see `corpora.documents`; by default the extension decides.
      encoding: see `storage.text_files.check_encoding`.

    Raises:
      CorpusError: if the file as a whole cannot be read.
    """
    kind = layout or kind_of(path)
    try:
        file = TextFile(path, encoding)
        if kind in READERS:
            yield from READERS[kind](path, file, bad, text_field)
        else:
            yield from _matches(path, file, bad, text_field, kind or "")
    except TextFileError as e:
        raise CorpusError(str(e)) from e


def _record(name: str, row: Any, bad: BadRows, text_field: str) -> Iterator[Document]:
    if isinstance(row, dict):
        text = row.get(text_field)
        yield Document(name, text if isinstance(text, str) else "", row)
    else:
        bad.add(name, "no JSON object")


def _text(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Yields the whole text as one document. Python sources may declare their encoding (PEP 263)."""
    data, declared = b"".join(file.blocks()), None
    if _ending(path) == ".py" and file.encoding is None:
        try:
            declared = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        except SyntaxError:
            declared = None
    if declared not in (None, "utf-8"):
        file = TextFile(path, declared, io.BytesIO(data))
        data = b"".join(file.blocks())
    text = file.decode(data)
    if text.strip():
        yield Document(str(path), text)


def _jsonl(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Reads one JSON object per line; a line that is not UTF-8 is a bad row."""
    for number, line in file.byte_lines():
        if line.strip():
            yield from _json_line(f"{path}:{number}", file, line, bad, text_field)


def _json_line(name: str, file: TextFile, line: bytes, bad: BadRows, text_field: str) -> Iterator[Document]:
    try:
        text = file.decode(line)
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        bad.add(name, f"no JSON ({' '.join(str(e).split())[:200]})")
        return
    yield from _json_row(name, row, _escapes_surrogates(text), bad, text_field)


def _escapes_surrogates(source: str) -> bool:
    return "\\ud" in source or "\\uD" in source


def _json_row(name: str, row: Any, escapes: bool, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Checks a parsed row: JSON can escape half a surrogate pair, which is not a character and breaks tokenizers."""
    if escapes:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            bad.add(name, f"half a surrogate pair, \\u{ord(e.object[e.start]):04x}: a character was cut in two")
            return
    yield from _record(name, row, bad, text_field)


def _json(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Reads a list of objects, an object whose field `data` is such a list, a single object, or JSON lines.

    A record's name ends in its number.
    """
    lines: Iterator[tuple[int, bytes]] = ((n, line) for n, line in file.byte_lines() if line.strip())
    number, first = next(lines, (0, b""))
    if not first:
        return
    try:
        alone = json.loads(file.decode(first))
    except (ValueError, RecursionError):
        alone = None  # the value spans several lines
    second = next(lines, None)
    lines = itertools.chain([] if second is None else [second], lines)
    if isinstance(alone, dict) and (second is not None or not isinstance(alone.get("data"), list)):
        for n, line in itertools.chain([(number, first)], lines):
            yield from _json_line(f"{path}:{n}", file, line, bad, text_field)
        return
    rest = [file.decode(line, number) for number, line in lines]
    text = "\n".join([file.decode(first), *rest])
    try:
        value = json.loads(text) if alone is None or rest else alone
    except (ValueError, RecursionError) as e:
        said = " ".join(str(e).split())
        raise CorpusError(f"{path} is neither a JSON list of records nor JSON lines: {said}") from None
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise CorpusError(f"{path} holds a JSON {type(value).__name__} instead of a list of records")
    escapes = _escapes_surrogates(text)  # of the whole file, once
    for number, row in enumerate(value, 1):
        yield from _json_row(f"{path}:{number}", row, escapes, bad, text_field)


def _names(path: epath.Path, names: list[str]) -> list[str]:
    """Checks the field names of a table's first line."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise CorpusError(f"{path}: the first line names {twice[0]!r} twice")
    return names


def _row(name: str, names: list[str], values: list[str], bad: BadRows, text_field: str) -> Iterator[Document]:
    if len(values) == len(names):
        yield from _record(name, dict(zip(names, values, strict=True)), bad, text_field)
    else:
        bad.add(name, f"{len(values)} fields, the first line names {len(names)}")


def _tsv(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Reads a table with tabs whose first line names the fields; there is no quoting."""
    lines = file.lines()
    names = _names(path, next(lines, (1, ""))[1].split("\t"))
    for number, line in lines:
        if line.strip(" ") or len(names) == 1:
            yield from _row(f"{path}:{number}", names, line.split("\t"), bad, text_field)


def _csv(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Reads a table with commas whose first line names the fields; quoted fields hold commas, quotes, line ends."""
    csv.field_size_limit(sys.maxsize)  # for the whole process; documents are longer than the 128 kB that it allows
    rows = csv.reader((f"{line}\n" for _, line in file.lines()), strict=True)
    names: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            if str(e) == "unexpected end of data":
                raise CorpusError(f"{path}:{number}: a quote is opened there that is never closed") from None
            bad.add(f"{path}:{number}", f"no row of a table ({e})")
            continue
        if row is None:
            return
        if names is None:
            names = _names(path, row)
        elif row:
            yield from _row(f"{path}:{number}", names, row, bad, text_field)


def _matches(path: epath.Path, file: TextFile, bad: BadRows, text_field: str, pattern: str) -> Iterator[Document]:
    """Reads lines that match a regular expression; its named groups are the fields."""
    for number, line in file.lines():
        match = re.fullmatch(pattern, line)
        if match is not None:
            yield Document(f"{path}:{number}", match.groupdict().get(text_field) or "", match.groupdict())
        elif line.strip():
            bad.add(f"{path}:{number}", f"does not match {pattern}")


def _conll(path: epath.Path, file: TextFile, bad: BadRows, universal: bool = False) -> Iterator[Document]:
    """Reads sentences: one word per line, a blank line between sentences, columns separated by tabs or else by blanks.

    Lines that begin a document end a sentence and are not words. The record holds one list per column, under the
    column's name in CoNLL-U (whose comments, multiword tokens and empty nodes are left out), else under its number,
    from "1". The text is the words joined by blanks.
    """
    rows: list[list[str]] = []
    first = 1
    for number, line in itertools.chain(file.lines(), [(0, "")]):
        if universal and line.startswith("#"):
            continue
        row = line.split("\t") if "\t" in line else [x for x in line.split(" ") if x]
        is_word = any(x.strip(" ") for x in row) and row[0] != "-DOCSTART-" and not line.startswith(DOCUMENTS)
        if is_word:
            first = first if rows else number
            rows += [row] if not universal or not NOT_WORDS.fullmatch(row[0]) else []
            continue
        sentence, rows, name = rows, [], f"{path}:{first}"
        if not sentence:
            continue
        widths = {len(row) for row in sentence}
        if len(widths) > 1 or (universal and widths != {len(CONLLU)}):
            bad.add(name, f"lines of {' and '.join(map(str, sorted(widths)))} columns in one sentence")
            continue
        if universal and (wrong := next((row[0] for row in sentence if not row[0].isdecimal()), None)) is not None:
            bad.add(name, f"the ID {wrong!r} is not a number")
            continue
        names = CONLLU if universal else [str(i + 1) for i in range(widths.pop())]
        record = dict(zip(names, map(list, zip(*sentence, strict=True)), strict=True))
        yield Document(name, " ".join(record["FORM" if universal else "1"]), record)


def _without_nulls(value: Any) -> Any:
    """Removes null members: a column of objects gives every row the members of all rows."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parquet(path: epath.Path, file: TextFile, bad: BadRows, text_field: str) -> Iterator[Document]:
    """Yields one record per row; nested columns are lists and objects, as in JSON."""
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise CorpusError(f"{path}: Parquet needs pyarrow: pip install 'llm_jax[parquet]'") from e
    try:
        with path.open("rb") as f:
            table = pq.ParquetFile(f, buffer_size=BLOCK, pre_buffer=False)  # else a row group stays in memory
            batches = (batch.to_pylist() for batch in table.iter_batches(ROWS))
            rows = ({k: _without_nulls(v) for k, v in row.items()} for batch in batches for row in batch)
            for number, row in enumerate(rows, 1):
                yield from _record(f"{path}:{number}", row, bad, text_field)
    except Exception as e:
        raise CorpusError(f"{path} is not a readable Parquet file: {' '.join(str(e).split())}") from e


READERS: dict[str, Callable[[epath.Path, TextFile, BadRows, str], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "conll": lambda path, file, bad, _: _conll(path, file, bad),
    "conllu": lambda path, file, bad, _: _conll(path, file, bad, universal=True),
    "parquet": _parquet,
}
