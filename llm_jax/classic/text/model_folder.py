"""Small models in folders: `NAME.json` says what `NAME.npz` holds, and is written last, so that a folder is whole."""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from llm_jax.classic.ngrams.stored import StoredError


def write(path: epath.PathLike, name: str, about: dict[str, Any], **arrays: Any) -> None:
    """Writes both files into a folder."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    with (folder / f"{name}.npz").open("wb") as f:
        np.savez(f, **arrays)
    (folder / f"{name}.json").write_text(json.dumps(about))


@contextlib.contextmanager
def reading(
    path: epath.PathLike, name: str, what: str
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """(what the JSON says, a function that reads the arrays by name), for use inside; what is missing is damage too.

    Raises:
      StoredError: for a folder that holds no `what`, or whose files are damaged.
    """
    folder = epath.Path(path)
    if not (folder / f"{name}.json").is_file():
        raise StoredError(f"{folder} holds no {name}.json: it is not a {what}, or writing it was cut short")

    def arrays() -> dict[str, Any]:
        with (folder / f"{name}.npz").open("rb") as f:
            return dict(np.load(f))

    try:
        yield json.loads((folder / f"{name}.json").read_text()), arrays
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise StoredError(f"{folder}: {name}.json or {name}.npz cannot be read: {e!r}") from None
