"""Labelled examples from files: texts, pairs, tagged words, questions with answers, choices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.data import corpora
from llm_jax.data.corpora import BadRows, CorpusError

# what `data.fields` names, by kind
FIELDS = {
    "classification": "a text, perhaps a second one, and the label",
    "regression": "a text, perhaps a second one, and the number",
    "tokens": "the words and their tags",
    "span": "the context, the question, the answer and where it starts",
    "choice": "a text, its choices (one field with a list, or several fields), and the label",
}
COUNTS = {"classification": (2, 3), "regression": (2, 3), "tokens": (2,), "span": (4,), "choice": range(3, 100)}


class Example(NamedTuple):
    """A labelled example as it was read.

    Attributes:
      name: where it came from, `path:line`.
      inputs: a text or two; the words; question and context; a text and its choices.
      label: a name or a number; tags; first and last character (None for no answer).
    """

    name: str
    inputs: tuple[str, ...]
    label: Any


def check_fields(kind: str, fields: Sequence[str]) -> None:
    """Raises CorpusError where `fields` are not those of the kind."""
    if kind not in FIELDS:
        raise CorpusError(f"kind={kind!r} cannot be read from files, only {', '.join(FIELDS)}")
    if len(fields) not in COUNTS[kind]:
        raise CorpusError(f"data.fields={tuple(fields)} must name {FIELDS[kind]}")


def _value(record: Mapping[str, Any], field: str) -> Any:
    outer, _, inner = field.partition(".")
    nested = record.get(outer)
    if field not in record and isinstance(nested, dict) and inner in nested:
        return nested[inner]
    if field not in record:
        raise ValueError(f"no field {field!r}, only {', '.join(record)}")
    return record[field]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {field!r} holds no text")
    return value


def _name(value: Any, field: str) -> str:
    if isinstance(value, (list, dict)) or value is None or not str(value).strip():
        raise ValueError(f"field {field!r} holds no label")
    return str(value).strip()


def _parse(record: Mapping[str, Any], kind: str, fields: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """(inputs, label) of a record; raises ValueError saying why there are none."""
    values = [_value(record, f) for f in fields]
    if kind == "tokens":
        words, tags = (v if isinstance(v, list) else [] for v in values)
        if not words or len(words) != len(tags):
            raise ValueError(f"{len(words)} words and {len(tags)} tags")
        return tuple(_text(w, fields[0]) for w in words), [_name(t, fields[1]) for t in tags]
    if kind == "span":
        context, question = (_text(v, f) for v, f in zip(values[:2], fields[:2], strict=True))
        answer, start = ((v or [None])[0] if isinstance(v, list) else v for v in values[2:])  # the first of several
        if answer in (None, ""):
            return (question, context), None
        begin, answer = int(start), str(answer)
        if begin < 0 or not context.startswith(answer, begin):
            raise ValueError(f"the answer {answer!r} does not stand at character {begin}")
        return (question, context), (begin, begin + len(answer))
    *given, label = values
    inputs: list[str] = []
    for value, field in zip(given, fields[:-1], strict=True):
        several = value if isinstance(value, list) and kind == "choice" else [value]
        inputs += [_text(x, field) for x in several]
    if kind == "regression":
        if not math.isfinite(float(label)):
            raise ValueError(f"{label!r} is not a finite number")
        return tuple(inputs), float(label)
    return tuple(inputs), _name(label, fields[-1])


def read(
    source: str,
    kind: str,
    fields: Sequence[str],
    validation: str | None = None,
    share: float = 0.0,
    layout: str | None = None,
    group: str | None = None,
    encoding: str | None = None,
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples.

    Args:
      source: see `corpora.find_files`.
      kind: one of `FIELDS`.
      fields: of the records, in the order that `FIELDS` says; `a.b` is field b of the object a.
      validation: the source that is held out; None holds out a share by hash.
      share: of the source, where there is no `validation`.
      layout: see `corpora.documents`.
      group: see `corpora.documents`.
      encoding: see `corpora.documents`.

    Raises:
      CorpusError: if a source is missing or no row can be used; the first bad one is named.
    """
    check_fields(kind, fields)
    parts: dict[str, list[Example]] = {"train": [], "validation": []}
    for name, part in (("train", source), ("validation", validation)):
        if part is None:
            continue
        bad = BadRows()
        for document in corpora.documents(part, bad, group=group, layout=layout, encoding=encoding):
            chosen = corpora.split_of(document, share) if validation is None else name
            try:
                parsed = _parse(document.record or {}, kind, fields)
            except (ValueError, TypeError) as e:
                bad.add(document.name, str(e))
                continue
            parts[chosen].append(Example(document.name, *parsed))
        if not any(parts.values() if validation is None else [parts[name]]):
            raise CorpusError(f"{part!r} holds no row with {FIELDS[kind]} {bad}")
    return parts["train"], parts["validation"]


def names_of(examples: Sequence[Example], kind: str, fields: Sequence[str]) -> tuple[str, ...]:
    """The labels, sorted, whole numbers by value; a number's field; the ends of a span."""
    if kind == "span":
        return "start", "end"
    if kind == "regression":
        return (fields[-1],)
    found = {label for e in examples for label in (e.label if kind == "tokens" else [e.label])}
    return tuple(sorted(found, key=int) if all(x.isdecimal() for x in found) else sorted(found))
