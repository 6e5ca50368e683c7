"""Work directories of this library, as training leaves them: `config.json`, tokenizer and checkpoints.

The checkpoints of a delta run leave its frozen base out, which is loaded from where `base.json` says that it is.
"""

import json
from collections.abc import Callable

from etils import epath
from jax.typing import DTypeLike

from llm_jax.data import tokenizers
from llm_jax.interop import referenced
from llm_jax.interop.names import InteropError
from llm_jax.models import parameters, registry
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Axes, Model, Params, Tree
from llm_jax.nn.realized import realize
from llm_jax.nn.ties import expand, parse

CHECKPOINTS = "checkpoints"
Place = Callable[[Params, Axes], Tree]  # (abstract params, logical axes) -> shardings


def is_in(path: epath.Path) -> bool:
    """Whether a folder is the work directory of a run."""
    return (path / CHECKPOINTS).exists()


def load(
    path: epath.Path,
    dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
    place: Place | None = None,
    average: bool | None = None,
    load_base: referenced.Load | None = None,
    base: epath.PathLike | None = None,
) -> tuple[Model, Params]:
    """The module and the parameters of the newest checkpoint, or their moving average (None: where there is one).

    Shared parameters are in every place, and realized nodes are what they become.

    Args:
      path: the folder.
      dtype: of floating parameters, as stored by default.
      execution: how the model runs.
      place: where parameters go, one device by default.
      average: the moving average, or the last parameters.
      load_base: `interop.load`, for the frozen base of a delta run.
      base: where that base is, if not where the folder says.

    Raises:
      InteropError: if the folder holds no config of ours, its base is not there, or it has none.
      BaseError: if another model is where the base was.
      CheckpointError: if there is no checkpoint, it is damaged, or it holds no average.
    """
    from llm_jax.storage.checkpoints import Checkpoints

    try:
        run = json.loads((path / "config.json").read_text())
        config, ties = registry.from_dict(run["model"]), parse(run.get("ties", ()))
    except (OSError, ValueError, KeyError) as e:
        raise InteropError(f"{path} is not a work directory of ours: {e}") from e
    model = config.make(execution)
    _, axes = parameters.declared(config)
    checkpoints = Checkpoints(path / CHECKPOINTS, read_only=True)
    on_devices = None if place is None else lambda shapes: place(shapes, axes)
    step, run, _ = checkpoints.read_run()
    rest = None
    if "base" in run and load_base is not None:
        rest = referenced.read(path, run["base"], load_base, place, axes, ties, base)
    elif base is not None:
        raise InteropError(f"{path} holds its whole model and takes no base={str(base)!r}")
    params, _ = checkpoints.restore_params(step, average=average, cast=dtype, place=on_devices, rest=rest)
    params = expand(realize(params), ties)
    parameters.check(model, params)
    return model, params


def save(path: epath.PathLike, model: Model, params: Params, tokenizer: tokenizers.Tokenizer | None = None) -> None:
    """Writes a work directory with one checkpoint, of step 0: structured weights stay structured.

    Raises:
      InteropError: if `path` holds a run already.
      CheckpointError: where the disk refuses.
    """
    from llm_jax.storage.checkpoints import Checkpoints

    folder = epath.Path(path)
    if is_in(folder):
        raise InteropError(f"{folder} holds a run already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    parameters.check(model, params)
    config = {"model": registry.to_dict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
    checkpoints = Checkpoints(folder / CHECKPOINTS, asynchronous=False)
    checkpoints.save(0, {"params": params}, {"config": config})
    checkpoints.close()
