"""The frozen base of a delta run, which its checkpoints leave out: finding it, and what it gives.

`base.json` in the work directory says where the base is: as an absolute path, and relative to the work directory, so
that both may move together. Where only the base moved, `interop.load(workdir, base=NEW)` takes it from there, and
resuming with `experiments.finetune --model=NEW` writes `base.json` anew. A fingerprint tells another model.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from llm_jax import config as configs
from llm_jax.delta.base import Base, left_out
from llm_jax.interop.names import InteropError
from llm_jax.nn import paths
from llm_jax.nn.protocols import Axes, Params, Tree
from llm_jax.nn.ties import Ties, tie
from llm_jax.storage.text_files import write_whole

FILE = "base.json"
Load = Callable[..., Any]  # `interop.load`
Place = Callable[[Params, Axes], Tree]


def note(workdir: epath.Path, base: Base) -> None:
    """Writes where the base of a run is."""
    write_whole(workdir / FILE, json.dumps({"path": base.path, "relative": base.relative}, indent=2) + "\n")


def find(workdir: epath.Path, base: Base) -> str:
    """Where the base of a run is now: at its absolute path, relative to the work directory, or on the hub.

    Raises:
      InteropError: if it is in neither place.
    """
    path, relative = base.path, base.relative
    if (workdir / FILE).exists():
        try:
            noted = json.loads((workdir / FILE).read_text())
            path, relative = noted["path"], noted.get("relative", "")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InteropError(f"{workdir / FILE} is damaged ({e}): write {{'path': ...}} with the base's path") from e
    places = [path, str(workdir / relative)] if relative else [path]
    for place in places:
        if epath.Path(place).exists():
            return place
    if not relative and not path.startswith("/"):
        return path  # the hub's name, for which `sources.find` looks
    raise InteropError(
        f"{workdir} holds a delta, and its base is not at {' nor at '.join(places)}: write its new path into "
        f"{workdir / FILE}, or resume with experiments.finetune --model=PATH, or give interop.load base=PATH"
    )


def read(
    workdir: epath.Path,
    stored: dict[str, Any],
    load: Load,
    place: Place | None,
    axes: Axes,
    ties: Ties,
    where: epath.PathLike | None = None,
) -> dict[str, jax.Array]:
    """What the checkpoints of a run leave out, by path of the parameter.

    Args:
      workdir: of the run.
      stored: `base` of a checkpoint's `run`.
      load: `interop.load`.
      place: see there.
      axes: logical axes of the model's parameters.
      ties: parameters that the run shares.
      where: the base; where `find` says by default.

    Raises:
      InteropError: if the base is not there.
      BaseError: if it is another one.
    """
    base = configs.from_dict(Base, stored)
    where = find(workdir, base) if where is None else where
    head = {} if base.head is None else {"head": base.head, "labels": base.labels}
    first = None if base.delta.changes_base else place  # divided over devices, all of them would decompose it
    given = load(where, dtype=base.dtype, place=first, **head).params
    base.check(given, where)
    adapted = tie(base.adapt(given), ties)
    if first is not place and place is not None:
        adapted = jax.device_put(adapted, place(adapted, axes))
    names = set(left_out(adapted, given, base.trainable))
    return {path: x for path, x in paths.flatten(adapted) if path in names}
