"""A run whose token table begins with pre-trained word vectors."""

from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.interop.word_vectors import files, token_table
from llm_jax.nn import weights
from llm_jax.nn.protocols import Params
from llm_jax.training.rows import get_tokenizer
from llm_jax.training.run_config import RunConfig


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
      params: fresh parameters with the vectors in their table.
      tokenizer: of the run, trained where its work directory has none.
      says: one line about the words that have a vector.
    """

    params: Params
    tokenizer: Tokenizer
    says: str


def start(config: RunConfig, workdir: epath.PathLike, vectors: epath.PathLike) -> Start:
    """Fresh parameters with the vectors of a file.

    Args:
      config: of the run.
      workdir: of the run.
      vectors: file of word vectors, see `interop.word_vectors.files`.

    Raises:
      VectorsError: where no word of the tokenizer has a vector, and see `token_table.lay`.
    """
    tokenizer, model = get_tokenizer(config, epath.Path(workdir)), config.model.make()
    words = set(token_table.words_of(tokenizer).values())
    known, matrix = files.read(vectors, keep=words | {w.lower() for w in words})
    if not known:
        raise VectorsError(f"{vectors} holds none of the tokenizer's {len(words):,} words")
    fresh = jax.jit(lambda key: model.init(key, np.ones((1, 2), np.int32))["params"])
    params = weights.split_axes(fresh(jax.random.key(config.training.seed)))[0]
    laid = token_table.lay(params, tokenizer, WordVectors(known, matrix))
    covered = f"{laid.coverage.found:,} of {laid.coverage.words:,} words have a vector"
    return Start(laid.params, tokenizer, f"{covered}, {laid.kept:.1%} of whose squared length is kept")
