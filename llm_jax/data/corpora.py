"""Documents from sources: files of the kinds of `records`, folders, globs, and `stdlib`.

The embedded corpus `stdlib` is the Python standard library's own sources, which are on every machine.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import re
import sysconfig
from collections.abc import Iterator, Mapping

from etils import epath

from llm_jax.data.records import ENDINGS, READERS, BadRows, CorpusError, Document, kind_of, read_file
from llm_jax.storage.digests import FileDigest, digest_files

log = logging.getLogger(__name__)

LAYOUTS = tuple(READERS)
SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3")


def find_files(source: str, layout: str | None = None) -> list[epath.Path]:
    """Files of a source, sorted.

    Args:
      source: `stdlib`, a file, a folder, a glob; several joined by commas.
      layout: see `documents`; without it a folder's files of unknown kinds are left out.

    Raises:
      CorpusError: if nothing is found, or a file that is named is of an unknown kind and `layout` does not say which.
    """
    return _find(source, layout)[0]


def _find(source: str, layout: str | None) -> tuple[list[epath.Path], list[epath.Path]]:
    """(files to read, other files of the folders)."""
    files: list[epath.Path] = []
    others: list[epath.Path] = []
    for part in source.split(","):
        if not part:  # the empty path is the current folder
            raise CorpusError(f"{source!r} names an empty path: remove the comma, or give a file, a folder or a glob")
        if part == "stdlib":
            root = epath.Path(sysconfig.get_path("stdlib"))
            files += [p for p in _walk(root, SKIPPED) if p.name.endswith(".py")]
            continue
        path = epath.Path(part)
        if any(c in part for c in "*?["):
            named = [p for p in map(epath.Path, _glob(part)) if p.is_file()]
        elif path.is_dir():
            for p in _walk(path):
                (others if layout is None and kind_of(p) is None else files).append(p)
            continue
        elif path.is_file():
            named = [path]
        else:
            raise CorpusError(f"no corpus at {part!r}: give a file, a folder, a glob, or 'stdlib'")
        if layout is None and (unknown := next((p for p in named if kind_of(p) is None), None)) is not None:
            raise CorpusError(
                f"the name of {unknown} does not say what it holds (by {' '.join(ENDINGS)}): set data.layout "
                f"(--layout) to {', '.join(LAYOUTS)}, or to a regular expression with named groups"
            )
        files += named
    if not files:
        raise CorpusError(f"{source!r} matches no readable file ({' '.join(ENDINGS)}, also with .gz or .zst)")
    return sorted(set(files), key=str), others


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


def documents(
    source: str,
    bad: BadRows | None = None,
    text_field: str = "text",
    group: str | None = None,
    layout: str | None = None,
    encoding: str | None = None,
) -> Iterator[Document]:
    """All documents of a source, in the order of the sorted file names.

    Args:
      source: see `find_files`.
      bad: counts what is skipped.
      text_field: field of records (JSON, tables, Parquet) that holds the text.
      group: `field` or `field:REGEX` of records: those that agree in its value, or in what the expression finds there,
        are one group.
      layout: of all files, whatever their names end in: one of `LAYOUTS`, or a regular expression with named groups
        that every line of a file matches whole.
      encoding: of files without a byte order mark: None for UTF-8, the name of another one, or `replace` for UTF-8 with
        U+FFFD where a file is none.

    Raises:
      CorpusError: if there is no file, or no document in them, a file is not in its encoding, a record lacks the
        group's field, or `layout` is none.
    """
    field, _, pattern = (group or "").partition(":")
    if layout is not None and layout not in LAYOUTS:
        try:
            named = re.compile(layout).groupindex
        except re.error as e:
            raise CorpusError(f"data.layout={layout!r} is not a regular expression: {e}") from e
        if not named:
            raise CorpusError(
                f"data.layout={layout!r} is not one of {', '.join(LAYOUTS)} and has no named group (?P<...>)"
            )
    bad = BadRows() if bad is None else bad
    found = False
    files, others = _find(source, layout)
    if others:
        some = ", ".join(p.name for p in others[:3]) + ", ..." * (len(others) > 3)
        log.warning("files of unknown kinds left out in %s: %d (%s); data.layout reads them", source, len(others), some)
    for path in files:
        for document in read_file(path, bad, text_field, layout, encoding):
            found = True
            yield _grouped(document, field, pattern) if field else document
    if bad.count:
        log.warning("%d bad rows skipped in %s", bad.count, source)
    if not found:
        raise CorpusError(f"{source!r} holds no text {bad}")


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
    content = document.group or document.text or json.dumps(document.record, sort_keys=True, default=str)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_share * 2**64 else "train"


def file_digests(
    source: str, layout: str | None = None, stored: Mapping[str, FileDigest] | None = None
) -> dict[str, FileDigest]:
    """What every file of a source holds, as a digest by path; see `storage.digests.digest_files`.

    Raises:
      CorpusError: see `find_files`.
    """
    return digest_files(find_files(source, layout), stored)


def fingerprint(digests: Mapping[str, FileDigest]) -> str:
    """Hash over the names and contents of files; keys the token cache."""
    digest = hashlib.blake2b(digest_size=16)
    for path, file in sorted(digests.items()):
        digest.update(path.encode("utf-8", "surrogateescape"))
        digest.update(bytes.fromhex(file.digest))
    return digest.hexdigest()
