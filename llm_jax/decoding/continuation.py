"""The text of new tokens behind a prompt, whole and piece by piece, as the tokenizer joins both.

Tokens decoded alone lose what depends on the prompt: the blank of a Metaspace word that would begin a text, the other
bytes of a character, the word that a `##` piece belongs to.
"""

import os.path
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class Continuation:
    """Decodes the new tokens of one row.

    `piece` gives text as soon as no later token can change it; all pieces joined are `text` of the last tokens.

    Attributes:
      before: the last tokens of the prompt; they are decoded with the new ones, and their text is removed again.
      shown: text of all pieces so far.
    """

    def __init__(
        self,
        decode: Decode,
        prompt: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        settled: Callable[[list[int]], int] | None = None,
        window: int = 64,
    ) -> None:
        """Begins behind a prompt.

        Args:
          decode: ids to text.
          prompt: what the new tokens continue; empty where they are a text of their own.
          stop_strings: text ends before the first of them.
          settled: how many leading ids have a text that no later id changes; a tokenizer's own (`Tokenizer.settled`)
            where `decode` is its method. Whatever it says, U+FFFD at the end waits: half a character may become a
            whole one.
          window: tokens of a prompt that are decoded again with the new ones, where `settled` knows a safe cut.
        """
        settled = settled or getattr(getattr(decode, "__self__", None), "settled", None)
        self._decode, self._settled = decode, settled or len
        self._stops, self._hold = tuple(stop_strings), max(map(len, stop_strings), default=1) - 1
        start = 0 if settled is None else settled(list(prompt[: max(len(prompt) - window, 0)]))  # a cut changes no text
        self.before = list(prompt[start:])
        self._text_before = decode(self.before) if self.before else ""
        self.shown = ""

    def text(self, new: Sequence[int]) -> str:
        """The text of the new tokens, up to the first stop string."""
        whole = self._decode([*self.before, *new])
        text = whole[len(os.path.commonprefix((self._text_before, whole))) :]
        ends = [text.index(stop) for stop in self._stops if stop in text]
        return text[: min(ends)] if ends else text

    def piece(self, new: Sequence[int], done: bool) -> str:
        """The next piece: text of the new tokens that is final and in no earlier piece; all the rest once `done`."""
        if done:
            ready = self.text(new)
        else:
            final = max(self._settled([*self.before, *new]) - len(self.before), 0)
            ready = self.text(new[:final]).rstrip("\ufffd")
            ready = ready[: max(len(ready) - self._hold, 0)]
        out = ready[len(self.shown) :]
        self.shown += out
        return out
