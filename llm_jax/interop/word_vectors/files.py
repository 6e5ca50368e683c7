"""Files of word vectors, as word2vec, gensim, fastText and GloVe write them; `.gz` too.

`word2vec`: a line `V D`, then a line a word: the word and D numbers, between blanks. `glove`: the same lines without
the first. `word2vec_binary`: the same first line, then each word, a blank, and D float32, the least byte first; the C
program puts a line feed behind each vector and gensim does not, so that line feeds belong to no word.

A word of GloVe's largest file may hold blanks (`. . .`): the numbers are the last ones of a line.
"""

import gzip
import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from etils import epath

from llm_jax.classic.text.sentences import POLICIES
from llm_jax.classic.vectors.word_vectors import VectorsError
from llm_jax.interop.word_vectors.rows import FORMATS, VectorFile
from llm_jax.storage.text_files import TextFile, TextFileError

log = logging.getLogger(__name__)
ROWS = 4096  # rows written at once


def read(
    path: epath.PathLike,
    format: str | None = None,
    limit: int | None = None,
    keep: Collection[str] | None = None,
    invalid: str = "strict",
    block_bytes: int = 1 << 23,
) -> tuple[list[str], np.ndarray]:
    """Reads words and vectors.

    Args:
      path: the file; `.gz` is unpacked.
      format: one of FORMATS; None finds it out: two whole numbers in the first line are a header, and a first vector
        that is not text is binary.
      limit: number of words to read from the beginning, the most frequent ones in most files.
      keep: words to return; the numbers of all others are skipped.
      invalid: what becomes of words that are not UTF-8: `strict` is an error, `skip` drops them, `replace` puts U+FFFD
        instead of wrong bytes; both warn and say how many.
      block_bytes: bytes read at once, about; the first block must hold the first line.

    Returns:
      The words, in the file's order, and their vectors, float32 `[V, D]`. Where a word stands twice, the first
      vector counts, as in gensim, with a warning.

    Raises:
      VectorsError: where the file is missing, empty, cut short, or does not hold what it says; with the line.
    """
    path = epath.Path(path)
    if format not in (None, *FORMATS):
        raise VectorsError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if invalid not in POLICIES:
        raise VectorsError(f"invalid={invalid!r} is not one of {', '.join(POLICIES)}")
    if limit is not None and limit < 1:
        raise VectorsError(f"limit={limit} is below 1")
    if not path.is_file():
        raise VectorsError(f"{path} is not a file")
    wanted = None if keep is None else {w.encode(errors="surrogatepass") for w in keep}
    words: list[bytes] = []
    tables = []
    try:
        reading = VectorFile(path, TextFile(path).blocks(block_bytes), format, limit, wanted)
        for some, table in reading.rows():
            if not np.isfinite(table).all():
                word = some[int(np.argmin(np.isfinite(table).all(1)))].decode(errors="replace")
                raise VectorsError(f"{path}: the vector of {word!r} holds numbers that are not finite")
            words += some
            tables.append(table)
    except TextFileError as e:
        raise VectorsError(f"{path}: damaged or cut short: {e.__cause__ or e}") from None
    matrix = np.concatenate(tables) if tables else np.zeros((0, reading.width), np.float32)
    return _once(path, *_decoded(path, words, matrix, invalid))


def _packed(raw: Any, path: epath.Path, mode: Any) -> Any:
    return gzip.GzipFile(fileobj=raw, mode=mode, compresslevel=6) if path.suffix == ".gz" else raw


def _decoded(path: epath.Path, words: list[bytes], matrix: np.ndarray, policy: str) -> tuple[list[str], np.ndarray]:
    try:
        return (b"\n".join(words).decode().split("\n") if words else []), matrix
    except UnicodeDecodeError:
        spelled = [w.decode(errors="replace") for w in words]
    bad = [i for i, (w, s) in enumerate(zip(words, spelled, strict=True)) if s.encode() != w]
    if policy == "strict":
        i = bad[0]
        raise VectorsError(
            f"{path}: word {i + 1:,}, {words[i][:30]!r}, is not UTF-8: write the file as UTF-8, or read it "
            "with invalid=skip or invalid=replace where there is that choice; or its first line names another width"
        )
    log.warning("%s: %s words were no UTF-8 (invalid=%s)", path, f"{len(bad):,}", policy)
    if policy == "skip":
        good = np.delete(np.arange(len(words)), bad)
        return [spelled[i] for i in good], matrix[good]
    return spelled, matrix


def _once(path: epath.Path, words: list[str], matrix: np.ndarray) -> tuple[list[str], np.ndarray]:
    first: dict[str, int] = {}
    for i, word in enumerate(words):
        first.setdefault(word, i)
    if len(first) == len(words):
        return words, matrix
    twice = next(w for i, w in enumerate(words) if first[w] != i)
    repeated = f"{len(words) - len(first):,} rows repeat a word, as {twice!r}"
    log.warning("%s: %s; the first vector of each is kept", path, repeated)
    return list(first), matrix[list(first.values())]


def write(path: epath.PathLike, words: Sequence[str], matrix: np.ndarray, format: str = "word2vec") -> None:
    """Writes words and vectors: under another name first, so that a file is whole or absent.

    Args:
      path: the file; `.gz` is compressed.
      words: V of them, without blanks, all different.
      matrix: `[V, D]`, written as float32; as text with nine digits, which keep every bit.
      format: one of FORMATS.

    Raises:
      VectorsError: for other shapes, a word that is empty, holds a blank or stands twice, numbers that are not finite.
    """
    path, matrix = epath.Path(path), np.asarray(matrix, np.float32)
    if format not in FORMATS:
        raise VectorsError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if matrix.ndim != 2 or len(matrix) != len(words) or not matrix.size:
        raise VectorsError(f"{path}: {len(words):,} words with a matrix {matrix.shape}: expected a row each")
    if not np.isfinite(matrix).all():
        word = words[int(np.argmin(np.isfinite(matrix).all(1)))]
        raise VectorsError(f"{path}: the vector of {word!r} holds numbers that are not finite")
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise VectorsError(f"{path}: {word!r} stands twice")
        seen.add(word)
        encoded = word.encode(errors="surrogatepass")
        if encoded.split() != [encoded] or encoded.decode(errors="replace") != word:
            raise VectorsError(
                f"{path}: {word!r} is empty, holds a blank or is not UTF-8: files of vectors take no such word"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as raw, _packed(raw, path, "wb") as file:
        if format != "glove":
            file.write(f"{len(words)} {matrix.shape[1]}\n".encode())
        row_of = " ".join(["%s"] + ["%.9g"] * matrix.shape[1]) + "\n"
        for begin in range(0, len(words), ROWS):
            pairs = zip(words[begin : begin + ROWS], matrix[begin : begin + ROWS], strict=True)
            if format == "word2vec_binary":
                file.write(b"".join(b"%s %s\n" % (w.encode(), x.astype("<f4").tobytes()) for w, x in pairs))
            else:
                file.write("".join([row_of % (w, *x.tolist()) for w, x in pairs]).encode())
    part.replace(path)
