"""The work directory of a run: one live run at a time, one config, the same data."""

import json
import logging
from collections.abc import Mapping
from typing import Any, TextIO

import jax
from etils import epath

from llm_jax.storage import digests, locks
from llm_jax.storage.checkpoints import CheckpointError, Checkpoints
from llm_jax.storage.digests import FileDigest
from llm_jax.storage.text_files import write_whole
from llm_jax.training.optimizers import OptimizerConfig, unread

log = logging.getLogger(__name__)

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
    *("data.verify", "data.cache"),
)


class WorkdirError(ValueError):
    """A work directory that is in use, or belongs to another config or to other data."""


def has_checkpoint(path: epath.PathLike) -> bool:
    """Whether a run left at least one finished checkpoint."""
    folder = epath.Path(path) / "checkpoints"
    return folder.exists() and any(p.name.isdigit() for p in folder.iterdir())


def todays(run: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of an earlier version, as this version writes it.

    `model.both_ways` of XLNets became `objective.both_ways`: the direction belongs to the rows. Fields that an
    optimizer does not read could have any value.
    """
    model, objective, optimizer = run.get("model"), run.get("objective"), run.get("optimizer")
    if isinstance(optimizer, dict) and "name" in optimizer:
        ignored = unread(optimizer["name"], optimizer.get("schedule", OptimizerConfig.schedule))
        run = {**run, "optimizer": {k: v for k, v in optimizer.items() if k not in ignored}}
    if not isinstance(model, dict) or "both_ways" not in model:
        return run
    run = {**run, "model": {k: v for k, v in model.items() if k != "both_ways"}}
    if isinstance(objective, dict) and "longest" in objective:  # a permutation LM, which alone had such rows
        run["objective"] = {**objective, "both_ways": model["both_ways"]}
    return run


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
        """Enters the folder, which is locked since it was made."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Releases the lock on the folder."""
        if self._lock is not None:
            self._lock.close()

    def settle_config(self, config: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """Writes `config.json`, or checks that an earlier run used the same one.

        Args:
          config: the whole run.
          defaults: what fields mean that the earlier run did not have, because its version of this library had not.

        Raises:
          WorkdirError: naming the fields that differ; or where nothing says any more what the earlier run was.
        """
        if has_checkpoint(self.path):
            old, new = _flat(todays(self._earlier_config())), _flat(config)
            old = {k: v for k, v in _flat(defaults or {}).items() if k in new} | old
            names = sorted({k for k, _ in old.items() ^ new.items() if not k.startswith(FREE)})
            if names:
                shown = ", ".join(f"{n}: {old.get(n)} -> {new.get(n)}" for n in names[:5])
                remedy = "choose another --workdir, or set these fields back"
                raise WorkdirError(f"{self.path} holds a run with another config ({shown}); {remedy}")
        if jax.process_index() == 0:
            write_whole(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def _earlier_config(self) -> dict[str, Any]:
        """What `config.json` says, or the newest checkpoint where that file is missing or damaged."""
        file = self.path / "config.json"
        try:
            found = json.loads(file.read_text())
            if isinstance(found, dict):
                return found
        except (OSError, ValueError):
            pass
        log.warning("%s is missing or damaged; the newest checkpoint says what the run was", file)
        try:
            found = Checkpoints(self.path / "checkpoints", read_only=True).read_run()[1].get("config")
        except CheckpointError as e:
            raise WorkdirError(f"{file} is missing or damaged, and no checkpoint says what the run was: {e}") from e
        if not isinstance(found, dict):
            raise WorkdirError(f"{file} is missing or damaged, and the newest checkpoint holds no config")
        return found

    def began_before_digests(self) -> bool:
        """Whether an earlier version began the run here, which stored no digests of its data."""
        return has_checkpoint(self.path) and not (self.path / "data.json").exists()

    def known_data(self) -> dict[str, FileDigest]:
        """Digests of the data files that the run read; empty for a run that stored none.

        Raises:
          ValueError: if they are damaged.
        """
        return digests.load(self.path / "data.json")

    def settle_data(self, data: Mapping[str, FileDigest], accept_changed: bool = False) -> None:
        """Writes `data.json`, or checks that a resumed run reads the files that it began with.

        Args:
          data: digests by path.
          accept_changed: resumes on other data, with a warning that names them.

        Raises:
          WorkdirError: naming the files that changed.
        """
        if has_checkpoint(self.path):
            try:
                before = self.known_data()
                changed = _changes(before, data) if before else ""  # an older version stored none
            except ValueError as e:
                changed = f"{e}, so nothing says whether the data changed"
            if changed and not accept_changed:
                remedy = "--accept_changed_data resumes on what is there now; or choose another --workdir"
                raise WorkdirError(f"the data of the run in {self.path} changed: {changed}; {remedy}")
            if changed:
                log.warning("resuming on changed data: %s", changed)
        digests.save(self.path / "data.json", data)


def _changes(before: Mapping[str, FileDigest], after: Mapping[str, FileDigest]) -> str:
    """What differs, in words; the first few files. Files of the same names that only moved are the same data."""
    named = lambda files: sorted((epath.Path(path).name, file.digest) for path, file in files.items())
    if named(before) == named(after):
        return ""
    found = [f"{path} is gone" for path in before if path not in after]
    found += [f"{path} is new" for path in after if path not in before]
    for path, old in before.items():
        if path in after and after[path].digest != old.digest:
            found.append(f"{path} was replaced ({old.size:,} -> {after[path].size:,} bytes)")
    return ", ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): json.dumps(tree)}
    out: dict[str, str] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.")
    return out
