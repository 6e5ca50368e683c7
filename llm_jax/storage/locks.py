"""Locks on local files: one process at a time."""

import fcntl
from typing import TextIO

from etils import epath


def hold(path: epath.PathLike, wait: bool = False) -> TextIO:
    """Locks a local file until it is closed or the process ends, however it ends.

    Args:
      path: the file.
      wait: wait until no other process has locked it.

    Raises:
      BlockingIOError: if another process has locked it, without `wait`.
    """
    file = open(path, "w")  # noqa: SIM115  whoever called closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file
