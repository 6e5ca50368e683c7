"""A result with NaN or infinity in it is an error."""

import numpy as np
from numpy.typing import ArrayLike


def check_finite(what: str, *values: ArrayLike) -> None:
    """Refuses results with NaN or infinity in them.

    Args:
      what: names the values in the message.
      *values: arrays or numbers.

    Raises:
      ValueError: that says how many are not finite.
    """
    wrong = sum(int((~np.isfinite(np.asarray(value, np.float64))).sum()) for value in values)
    if wrong:
        total = sum(np.asarray(value).size for value in values)
        raise ValueError(
            f"{wrong} of {total} numbers are not finite in {what}: the parameters are damaged, or the model overflows "
            "in its precision (try float32)"
        )
