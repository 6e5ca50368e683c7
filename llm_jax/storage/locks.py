"""One process at a time, of those that see a local file."""

import fcntl
from typing import TextIO

from etils import epath


def hold(path: epath.PathLike, wait: bool = False) -> TextIO:
    """A local file that this process has until the file is closed, or the process ends, however it ends.

    Args:
      path: the file.
      wait: until nobody else has it.

    Raises:
      BlockingIOError: where another has it, without `wait`.
    """
    file = open(path, "w")  # noqa: SIM115  whoever called closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file
