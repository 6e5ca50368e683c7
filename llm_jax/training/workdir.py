"""The work directory of a run: one live run at a time, one config."""

import json
from typing import Any, TextIO

import jax
from etils import epath

from llm_jax.storage import locks

# fields that may differ when a run resumes: how far and where it runs, and what it reports; and micro-batches, which
# are accumulation's or a pipeline's (another number of them draws other dropout)
FREE = (
    *(f"training.{n}" for n in ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last")),
    *(f"training.{n}" for n in ("keep_best", "max_bad_steps", "profile_start", "profile_steps")),
    "training.accumulation",
    *(
        f"plan.{n}"
        for n in ("data", "replica", "pipe", "schedule", "microbatches", "chunks", "seq", "model", "zero", "explicit")
    ),
    *(f"plan.{n}" for n in ("remat", "attention", "unroll", "offload", "compiler")),
)


class WorkdirError(ValueError):
    """A work directory that is in use, or belongs to another config."""


def has_checkpoint(path: epath.PathLike) -> bool:
    """Whether a run left at least one finished checkpoint."""
    folder = epath.Path(path) / "checkpoints"
    return folder.exists() and any(p.name.isdigit() for p in folder.iterdir())


class Workdir:
    """Holds a lock on a local folder while open, in the job's first process; remote folders are not locked."""

    def __init__(self, path: epath.PathLike) -> None:
        """Claims the folder.

        Raises:
          WorkdirError: if another process runs in it.
        """
        self.path = epath.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: TextIO | None = None
        if "://" in str(path) or jax.process_index():
            return
        try:
            self._lock = locks.hold(self.path / ".lock")
        except BlockingIOError as e:
            raise WorkdirError(f"{self.path} is in use by a live run; wait for it or choose another --workdir") from e

    def __enter__(self) -> "Workdir":
        """Itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.close()

    def settle_config(self, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """Writes `config.json`, or checks that an earlier run used the same one.

        Args:
          config: the whole run.
          defaults: what fields mean that the earlier run did not have, because its version of this library had not.

        Raises:
          WorkdirError: naming the fields that differ.
        """
        file = self.path / "config.json"
        if file.exists() and has_checkpoint(self.path):
            try:
                before = json.loads(file.read_text())
            except ValueError:
                before = config
            old, new = _flat(before), _flat(config)
            old = {k: v for k, v in _flat(defaults or {}).items() if k in new} | old
            names = sorted({k for k, _ in old.items() ^ new.items() if not k.startswith(FREE)})
            if names:
                shown = ", ".join(f"{n}: {old.get(n)} -> {new.get(n)}" for n in names[:5])
                raise WorkdirError(f"{self.path} holds a run with another config ({shown}); choose another --workdir")
        if jax.process_index() == 0:
            file.write_text(json.dumps(config, indent=2) + "\n")


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): json.dumps(tree)}
    out: dict[str, str] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.")
    return out
