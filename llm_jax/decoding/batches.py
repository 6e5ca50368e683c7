"""Decodes many prompts, a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Out = TypeVar("Out")


def in_batches(
    decode: Callable[[list[list[int]]], Sequence[Out]],
    prompts: Sequence[list[int] | None],
    batch_size: int,
    num_return: int = 1,
) -> Iterator[Out | None]:
    """Yields the outputs of every prompt in order, as soon as its batch is done.

    Args:
      decode: gives `num_return` outputs per prompt, those of a prompt together.
      prompts: token ids; None for an empty line, which is not decoded.
      batch_size: most prompts per call of `decode`.
      num_return: outputs per prompt.

    Yields:
      `num_return` outputs per prompt; None in place of each output of an empty line.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        filled = [prompt for prompt in batch if prompt is not None]
        outputs = iter(decode(filled) if filled else ())
        for prompt in batch:
            for _ in range(num_return):
                yield None if prompt is None else next(outputs)
