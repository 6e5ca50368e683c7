"""N-grams of files, counted in memory or through files in a scratch folder, and the sentences held out of them."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llm_jax.classic.ngrams import counting, held_out, streaming
from llm_jax.classic.ngrams.counting import Counts
from llm_jax.classic.text import sentences
from llm_jax.classic.text.sentences import END, UNKNOWN, Reader, Vocabulary

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """A corpus, counted.

    Attributes:
      vocabulary: of V words.
      counts: of its n-grams; where they were counted through files, mapped from these.
      held_out: numbered sentences that were not counted, `[T]`; None where none are wanted.
    """

    vocabulary: Vocabulary
    counts: Counts
    held_out: np.ndarray | None

    @property
    def words(self) -> int:
        """Words of the text that was counted, without the ends of sentences."""
        return int(self.counts.counts[0].sum() - self.counts.counts[0][END])

    @property
    def unknown(self) -> int:
        """Number of unknown words."""
        return int(self.counts.counts[0][UNKNOWN])


@contextlib.contextmanager
def count_files(
    reader: Reader,
    order: int,
    *,
    vocabulary: Vocabulary | None = None,
    min_count: int = 1,
    max_size: int | None = None,
    hold_out: Reader | bool = False,
    closed: bool = False,
    scratch: epath.PathLike | None = None,
    workers: int = 1,
    progress: bool = False,
    say: Callable[[str], object] = log.info,
) -> Iterator[Corpus]:
    """Reads and counts; what is in `scratch` is deleted at the end, and stays for the next start after an interrupt.

    Args:
      reader: the files.
      order: words of the longest n-grams.
      vocabulary: of the text; made from it where None.
      min_count: rarer words are unknown, where no vocabulary is given.
      max_size: keeps so many words, the most frequent, where no vocabulary is given.
      hold_out: files that are held out, or whether the last tenth of the sentences is, which needs no `scratch`.
      closed: nothing is ever unknown, so that words of the last tenth are known too.
      scratch: folder for files, see `streaming`; None counts in memory.
      workers: processes that count, with `scratch`.
      progress: shows a bar.
      say: is told where counting resumes, and what is held out.

    Raises:
      ValueError: see `streaming.resumable`, `held_out.last_tenth`; for a last tenth with `scratch`.
      TextError: see `sentences.read`.
    """
    thresholds = {"min_count": min_count, "max_size": max_size}
    options: dict[str, Any] = {"vocabulary": vocabulary} if vocabulary else thresholds
    if scratch is not None:
        if hold_out is True:
            raise ValueError("the last tenth of a text that is counted through files cannot be held out: name files")
        with streaming.resumable(scratch, reader, **options) as folder:
            if (folder / streaming.WRITTEN).exists():
                say(f"going on with what is in {folder}")
            words, ends = streaming.write_text(reader, folder, **options)
            counts = streaming.count(folder, len(words), order, ends, workers, progress)
            yield Corpus(words, counts, _read(hold_out, words))
        return
    words, text = sentences.read(reader, **options)
    rest = _read(hold_out, words)
    if hold_out is True:
        cut, lines = held_out.last_tenth(text)
        if not closed and vocabulary is None:
            words, text = held_out.known_before(words, text, cut, min_count)
        text, rest = text[:cut], text[cut:]
        say(f"the last {lines:,} sentences, {len(rest) - 2 * lines:,} words, set the weights and are not counted")
    yield Corpus(words, counting.count(text, len(words), order, progress), rest)


def _read(hold_out: Reader | bool, vocabulary: Vocabulary) -> np.ndarray | None:
    return sentences.read(hold_out, vocabulary=vocabulary)[1] if isinstance(hold_out, Reader) else None
