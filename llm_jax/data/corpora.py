"""Documents from files: text, folders, globs, JSON lines, tables, CoNLL (plain, gzip, zstd), Parquet, and `stdlib`.

The embedded corpus `stdlib` is the Python standard library's own sources, which are on every machine.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import logging
import re
import sysconfig
from collections.abc import Iterator
from typing import Any

from etils import epath

log = logging.getLogger(__name__)

TEXT = (".txt", ".md", ".py", ".rst")
LAYOUTS = ("tsv", "jsonl", "conll", "conllu")  # of records, where a file's name does not tell
CONLLU = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3")


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


def find_files(source: str) -> list[epath.Path]:
    """Files of a source (`stdlib`, a file, a folder, a glob; several joined by commas), sorted.

    Raises:
      CorpusError: if nothing is found.
    """
    files: list[epath.Path] = []
    for part in source.split(","):
        if not part:  # the empty path is the current folder
            raise CorpusError(f"{source!r} names an empty path: remove the comma, or give a file, a folder or a glob")
        if part == "stdlib":
            root = epath.Path(sysconfig.get_path("stdlib"))
            files += [p for p in _walk(root, SKIPPED) if p.name.endswith(".py")]
            continue
        path = epath.Path(part)
        if any(c in part for c in "*?["):
            names = [str(p) for p in _glob(part)]
            files += [epath.Path(p) for p in names if epath.Path(p).is_file()]
        elif path.is_dir():
            files += [p for p in _walk(path) if _kind(p) is not None]
        elif path.is_file():
            files.append(path)
        else:
            raise CorpusError(f"no corpus at {part!r}: give a file, a folder, a glob, or 'stdlib'")
    if not files:
        raise CorpusError(
            f"{source!r} matches no readable file (.txt .md .py .rst .tsv .conll[u] .jsonl[.gz|.zst] .parquet [.gz])"
        )
    return sorted(set(files), key=str)


def _walk(folder: epath.Path, skipped: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in skipped:
                yield from _walk(path, skipped)
        else:
            yield path


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return glob.glob(pattern, recursive=True)
    root, _, rest = pattern.partition("*")
    base = root.rpartition("/")[0]
    return [str(p) for p in epath.Path(base).glob(pattern[len(base) + 1 :])]


def _kind(path: epath.Path) -> str | None:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    for kind in ("tsv", "conll", "conllu"):
        if name.endswith(f".{kind}"):
            return kind
    return "text" if name.endswith(TEXT) else None


def _decompress(path: epath.Path) -> bytes:
    data = path.read_bytes()
    try:
        if path.name.endswith(".gz"):
            return gzip.decompress(data)
        if path.name.endswith(".zst"):
            return _unzstd(data)
    except Exception as e:
        raise CorpusError(f"{path} cannot be decompressed: {e}") from e
    return data


def _unzstd(data: bytes) -> bytes:
    """All frames of a file; the library's reader stops after the first and takes a cut one for an end."""
    import zstandard

    frames = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(data))
        if not frame.eof:
            raise ValueError("it is cut short")
        data = frame.unused_data
    return b"".join(frames)


class BadRows:
    """Counts rows that had to be skipped; the first few are logged."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.count = 0

    def add(self, name: str, why: str) -> None:
        """Counts one."""
        self.count += 1
        if self.count <= 3:
            log.warning("skipping bad row %s: %s", name, why)


def read_file(
    path: epath.Path, bad: BadRows, text_field: str = "text", layout: str | None = None
) -> Iterator[Document]:
    """Documents of one file; a text file is one document."""
    kind = layout or _kind(path) or "text"
    if kind == "parquet":
        yield from _parquet(path, bad, text_field)
        return
    data = _decompress(path)
    if kind == "text":
        text = data.decode("utf-8", errors="replace")
        if text.strip():
            yield Document(str(path), text)
        return
    if kind in ("tsv", "conll", "conllu"):
        yield from _tsv(path, data, bad, text_field) if kind == "tsv" else _conll(path, data, bad, kind == "conllu")
        return
    if kind != "jsonl":
        yield from _matches(path, data, bad, text_field, kind)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            bad.add(name, f"no JSON ({e})")
            continue
        if not isinstance(row, dict):
            bad.add(name, "no JSON object")
        elif isinstance(row.get(text_field), str):
            yield Document(name, row[text_field], row)
        else:
            yield Document(name, "", row)


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")


def _tsv(path: epath.Path, data: bytes, bad: BadRows, text_field: str) -> Iterator[Document]:
    """A table with tabs whose first line names the fields; nothing is quoted."""
    lines = _lines(data)
    names = lines[0].split("\t")
    for number, line in enumerate(lines[1:], 2):
        values = line.split("\t")
        if len(values) == len(names):
            row = dict(zip(names, values, strict=True))
            yield Document(f"{path}:{number}", row.get(text_field, ""), row)
        elif line.strip():
            bad.add(f"{path}:{number}", f"{len(values)} fields, the first line names {len(names)}")


def _matches(path: epath.Path, data: bytes, bad: BadRows, text_field: str, pattern: str) -> Iterator[Document]:
    """Lines that a regular expression takes apart into named groups."""
    for number, line in enumerate(_lines(data), 1):
        match = re.fullmatch(pattern, line)
        if match is not None:
            yield Document(f"{path}:{number}", match.groupdict().get(text_field) or "", match.groupdict())
        elif line.strip():
            bad.add(f"{path}:{number}", f"does not match {pattern}")


def _conll(path: epath.Path, data: bytes, bad: BadRows, universal: bool) -> Iterator[Document]:
    """Sentences, a word a line and a blank line between; columns stand between tabs, or blanks where there is no tab.

    The record holds a list a column: by its name in CoNLL-U (whose comments, multiword tokens and empty nodes are left
    out), else by its number, from "1". The text is the words with blanks between.
    """
    rows: list[list[str]] = []
    first = 1
    for number, line in enumerate([*_lines(data), ""], 1):
        if universal and line.startswith("#"):
            continue
        if line.strip():
            row = line.split("\t") if "\t" in line else line.split()
            first = first if rows else number
            rows += [row] if not universal or row[0].isdecimal() else []
            continue
        sentence, rows, name = rows, [], f"{path}:{first}"
        if not sentence or sentence[0][0] == "-DOCSTART-":
            continue
        widths = {len(row) for row in sentence}
        if len(widths) > 1 or (universal and widths != {len(CONLLU)}):
            bad.add(name, f"lines of {' and '.join(map(str, sorted(widths)))} columns in one sentence")
            continue
        names = CONLLU if universal else [str(i + 1) for i in range(widths.pop())]
        record = dict(zip(names, map(list, zip(*sentence, strict=True)), strict=True))
        yield Document(name, " ".join(record["FORM" if universal else "1"]), record)


def _parquet(path: epath.Path, bad: BadRows, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise CorpusError(f"{path}: Parquet needs pyarrow: pip install 'llm_jax[parquet]'") from e
    try:
        with path.open("rb") as f:
            table = pq.ParquetFile(f)
            if text_field not in table.schema_arrow.names:
                raise CorpusError(f"{path} has no column {text_field!r}, only {table.schema_arrow.names}")
            number = 0
            for batch in table.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if isinstance(value, str):
                        yield Document(f"{path}:{number}", value)
                    else:
                        bad.add(f"{path}:{number}", f"{text_field} is {type(value).__name__}")
    except CorpusError:
        raise
    except Exception as e:
        raise CorpusError(f"{path} is no readable Parquet file: {e}") from e


def documents(
    source: str,
    bad: BadRows | None = None,
    text_field: str = "text",
    group: str | None = None,
    layout: str | None = None,
) -> Iterator[Document]:
    """All documents of a source, in the order of the sorted file names.

    Args:
      source: see `find_files`.
      bad: counts what is skipped.
      text_field: field of JSON rows and tables that holds the text.
      group: `field` or `field:REGEX` of JSON rows and tables: rows that agree in its value, or in what the expression
        finds there, are one group.
      layout: of all files, whatever their names end in: one of `LAYOUTS`, or a regular expression with named groups
        that every line of a file matches whole.

    Raises:
      CorpusError: if there is no file, or no document in them, a record lacks the group's field, or `layout` is none.
    """
    field, _, pattern = (group or "").partition(":")
    if layout is not None and layout not in LAYOUTS:
        try:
            named = re.compile(layout).groupindex
        except re.error as e:
            raise CorpusError(f"data.layout={layout!r} is no regular expression: {e}") from e
        if not named:
            raise CorpusError(
                f"data.layout={layout!r} is none of {', '.join(LAYOUTS)} and has no named group (?P<...>)"
            )
    bad = BadRows() if bad is None else bad
    found = False
    for path in find_files(source):
        for document in read_file(path, bad, text_field, layout):
            found = True
            yield _grouped(document, field, pattern) if field else document
    if bad.count:
        log.warning("%d bad rows skipped in %s", bad.count, source)
    if not found:
        raise CorpusError(f"{source!r} holds no text ({bad.count} bad rows)")


def _grouped(document: Document, field: str, pattern: str) -> Document:
    value = (document.record or {}).get(field)
    if not isinstance(value, str):
        raise CorpusError(f"{document.name} has no field {field!r}, which data.group names")
    match = re.search(pattern, value) if pattern else None
    if pattern and match is None:
        raise CorpusError(f"{document.name}: {value!r} does not match {pattern!r} of data.group")
    return dataclasses.replace(document, group=value if match is None else match[0])


def split_of(document: Document, validation_share: float) -> str:
    """`train` or `validation`, by a hash of the content: order, file names and additions do not move a document."""
    content = document.group or document.text or json.dumps(document.record, sort_keys=True)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_share * 2**64 else "train"


def fingerprint(source: str) -> str:
    """Hash over the names and contents of a source's files; keys the token cache."""
    digest = hashlib.blake2b(digest_size=16)
    for path in find_files(source):
        digest.update(str(path).encode())
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()
