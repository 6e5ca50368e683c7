"""The one place where a table meets ids; its rows may serve again as the output layer."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from llm_jax.nn import weights
from llm_jax.nn.output import Head, padded_size


class Embedding(nn.Module):
    """A table `[padded vocabulary, features]`.

    Attributes:
      vocab_size: V, real entries.
      features: D.
      pad_multiple: rows are padded to this multiple; padded rows are never looked up and their logits masked.
      scale: multiplies rows by sqrt(D), as Vaswani et al. 2017 do (Xavier-initialised rows have variance 1/D).
      vocab_axis: logical name of the rows.
    """

    vocab_size: int
    features: int
    pad_multiple: int = 1
    scale: bool = False
    vocab_axis: str | None = "vocab"
    table_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)

    def setup(self) -> None:
        """Declares the table, so that both methods may read it."""
        rows = padded_size(self.vocab_size, self.pad_multiple)
        self.table: Any = weights.parameter(
            self, "embedding", self.table_init, (rows, self.features), (self.vocab_axis, "embed")
        )

    def __call__(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        """Rows for `ids`: `[*ids.shape, D]`.

        Compiled code cannot raise. An id past the table's end gives NaN, so that the mistake shows in every result; a
        negative one counts from the end, and padded rows hold no entry. Ids are checked where they enter, on the host
        (`data.tokenizers.check_ids`).
        """
        x = weights.take(self.table, ids)
        x = x if dtype is None else x.astype(dtype)
        return weights.scaled(x, math.sqrt(self.features)) if self.scale else x

    def head(self, bias: jax.Array | None = None) -> Head:
        """The table as a tied output layer."""
        return Head(self.table, bias, self.vocab_size, transposed=True)
