"""N-gram models in folders of arrays, which are mapped and not read: a model may be larger than memory.

`model.json` says the kind and its order, `vocabulary.txt` the words by number, `keys_2.npy` and so on hold the arrays.
"""

import json
from typing import Any

import numpy as np
from etils import epath

from llm_jax.classic.ngrams import arpa
from llm_jax.classic.ngrams.ngram import AddKModel, BackoffModel, Model
from llm_jax.classic.text.sentences import SPECIAL, Vocabulary

ARRAYS = {"backoff": ("keys", "log_probs", "backoffs"), "add_k": ("keys", "counts")}


class StoredError(ValueError):
    """A folder that is not a model; one line that says why."""


def is_arpa(path: epath.PathLike) -> bool:
    """Whether a name is that of an ARPA file."""
    return str(path).endswith((".arpa", ".arpa.gz", ".lm", ".lm.gz"))


def save(model: Model, path: epath.PathLike, progress: bool = False) -> None:
    """Writes an ARPA file (`.arpa`, `.lm`, also with `.gz`; with a bar if `progress`) or a folder of arrays."""
    if is_arpa(path):
        arpa.write(model, path, progress)
        return
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    kind = "add_k" if isinstance(model, AddKModel) else "backoff"
    for name in ARRAYS[kind]:
        for n, x in enumerate(getattr(model, name), start=1):
            with (folder / f"{name}_{n}.npy").open("wb") as f:
                np.save(f, x)
    (folder / "vocabulary.txt").write_text("\n".join(model.vocabulary.words) + "\n")
    about: dict[str, Any] = {"kind": kind, "order": model.order}
    if isinstance(model, AddKModel):
        about |= {"k": model.k, "closed": model.closed}
    (folder / "model.json").write_text(json.dumps(about))  # the last: a folder without it is not a model


def load(path: epath.PathLike, progress: bool = False) -> Model:
    """Reads what `save` wrote, or any ARPA file (with a bar if `progress`); arrays of folders are mapped.

    Raises:
      ArpaError: see `arpa.read`.
      StoredError: for a folder that is not a model, or whose arrays do not fit together.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        return arpa.read(path, progress)
    if not (folder / "model.json").is_file():
        raise StoredError(f"{folder} holds no model.json: it is not an n-gram model, or writing it was cut short")
    try:
        about = json.loads((folder / "model.json").read_text())
        kind, order = about["kind"], int(about["order"])
        names = ARRAYS[kind]
        words = (folder / "vocabulary.txt").read_text().split("\n")
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise StoredError(f"{folder}: model.json or vocabulary.txt cannot be read: {e!r}") from None
    if tuple(words[: len(SPECIAL)]) != SPECIAL or words.pop() != "":
        raise StoredError(f"{folder}: vocabulary.txt was cut short or is of something else")
    vocabulary = Vocabulary(words[len(SPECIAL) :])
    arrays: dict[str, list[np.ndarray]] = {}
    for name in names:
        orders = order - (name == "backoffs")
        try:
            arrays[name] = [np.load(folder / f"{name}_{n}.npy", mmap_mode="r") for n in range(1, orders + 1)]
        except (OSError, ValueError) as e:
            raise StoredError(f"{folder}: {name} cannot be read: {e}") from None
        if [len(x) for x in arrays[name]] != [len(x) for x in arrays["keys"]][:orders]:
            raise StoredError(f"{folder}: {name} has other lengths than the keys")
    if len(arrays["keys"][0]) != len(vocabulary):
        raise StoredError(f"{folder}: {len(vocabulary):,} words, but arrays of {len(arrays['keys'][0]):,}")
    if kind == "add_k":
        return AddKModel(vocabulary, **arrays, k=about["k"], closed=about["closed"])
    return BackoffModel(vocabulary, **arrays)
