"""One process at a time."""

import fcntl
from typing import TextIO

from etils import epath


def hold(path: epath.PathLike) -> TextIO:
    """A local file that this process has until the file is closed, or the process ends, however it ends.

    Raises:
      BlockingIOError: where another has it.
    """
    file = open(path, "w")  # noqa: SIM115  whoever called closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
