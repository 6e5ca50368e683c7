"""Tiles of a sub-sampled text, step by step, each from its number alone, so that a run resumes anywhere.

What stays of a text is drawn again every epoch, a piece of it at a time; the words that stay run on over the ends of
pieces and epochs, so that tiles are full and no pair is lost. Windows do not cross sentences.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from llm_jax.classic.vectors.word2vec import Word2VecConfig


class Windows:
    """An iterator over the batches of `word2vec.run_blocks`.

    Attributes:
      steps: of all epochs.
      reach: words on either side of a tile: the window, or less where no sentence is as long.
    """

    def __init__(
        self,
        config: Word2VecConfig,
        text: np.ndarray,
        sentences: np.ndarray,
        keep: np.ndarray,
        epochs: int,
        seed: int,
        piece_size: int = 1 << 20,
    ) -> None:
        """Draws once through all epochs, to count what stays.

        Args:
          config: of the model.
          text: words, int32 `[T]`; may be mapped from a file.
          sentences: the sentence of each, int32 `[T]`.
          keep: probability of each word to stay, `[V]`.
          epochs: times through the text.
          seed: of what stays.
          piece_size: words whose fate is drawn together.

        Raises:
          ValueError: where no word stays, or no sentence has two words.
        """
        self.config, self.text, self.sentences, self.keep, self.seed = config, text, sentences, keep, seed
        self.piece_size, self.pieces = piece_size, -(-len(text) // piece_size)
        if not len(text):
            raise ValueError("no word of the text is in the vocabulary: take a smaller min_count")
        edges = np.flatnonzero(np.diff(sentences)) + 1
        self.reach = min(config.window, int(np.diff(edges, prepend=0, append=len(text)).max()) - 1)
        if not self.reach:
            raise ValueError(
                "no sentence of the text has two words of the vocabulary: there are no pairs to learn from"
            )
        sizes = [int(self._stays(i).sum()) for i in range(self.pieces * epochs)]
        self.ends = np.cumsum(sizes)
        total = int(self.ends[-1])
        if not total:
            raise ValueError(f"sample={config.sample} leaves no word of the text: take a larger one, or 0")
        self.steps = -(-total // (config.block * config.blocks))
        self._step = 0
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pool = ThreadPoolExecutor(1)  # makes the next batch meanwhile; nobody else touches the cache
        self._next: tuple[int, Future[dict[str, np.ndarray]]] | None = None

    def _ids(self, piece: int) -> tuple[np.ndarray, slice]:
        begin = piece % self.pieces * self.piece_size
        part = slice(begin, begin + self.piece_size)
        return self.text[part], part

    def _stays(self, piece: int) -> np.ndarray:
        ids, _ = self._ids(piece)
        rng = np.random.Generator(np.random.SFC64((self.seed, piece)))
        return rng.random(len(ids), np.float32) < self.keep[ids]

    def _piece(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        if piece not in self._cache:
            self._cache = {k: v for k, v in self._cache.items() if k >= piece - 1}
            ids, part = self._ids(piece)
            stays = self._stays(piece)
            self._cache[piece] = ids[stays], self.sentences[part][stays]
        return self._cache[piece]

    def _span(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Words that stay, from `begin` to `end` of all epochs, and their sentences; -1 beyond both ends."""
        total = int(self.ends[-1])
        words, sentences = np.zeros(end - begin, np.int32), np.full(end - begin, -1, np.int32)
        at, stop = max(begin, 0), min(end, total)
        while at < stop:
            piece = int(np.searchsorted(self.ends, at, side="right"))
            first = int(self.ends[piece - 1]) if piece else 0
            upto = min(stop, int(self.ends[piece]))
            ids, of = self._piece(piece)
            words[at - begin : upto - begin] = ids[at - first : upto - first]
            sentences[at - begin : upto - begin] = of[at - first : upto - first]
            at = upto
        return words, sentences

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The iterator itself."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """`words` and `sentences`, int32 `[blocks, tiles, L + 2 reach]`; behind the last step the first ones again."""
        step, ready = self._step, self._next
        batch = ready[1] if ready is not None and ready[0] == step else self._pool.submit(self._batch, step)
        self._step, self._next = step + 1, (step + 1, self._pool.submit(self._batch, step + 1))
        return batch.result()

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        c = self.config
        centres, width = c.block * c.blocks, c.length + 2 * self.reach
        begin = step % self.steps * centres
        span = self._span(begin - self.reach, begin + centres + self.reach)
        rows = [sliding_window_view(x, width)[:: c.length].reshape(c.blocks, c.tiles, width) for x in span]
        return dict(zip(("words", "sentences"), rows, strict=True))

    def state(self) -> dict[str, Any]:
        """Position in the data as a JSON-ready value, for checkpoints."""
        return {"step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a position that `state` returned."""
        self._step = int(state["step"])
