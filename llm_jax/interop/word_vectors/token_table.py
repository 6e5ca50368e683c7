"""Pre-trained word vectors as the token embedding of any family.

What trains is then chosen as ever: `training.trainable=("re:(?!embed/).*",)` freezes the table, and with it a tied
output layer. Vectors of another width are projected once (`classic.vectors.project.resize`); a projection that trains
is BERT's `embedding_dim`, or that of the text classifiers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llm_jax.classic.vectors.project import Coverage, look_up, resize
from llm_jax.classic.vectors.word_vectors import VectorsError, WordVectors
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params

TABLE = "embed/embedding"


class Laid(NamedTuple):
    """Parameters with vectors in their table.

    Attributes:
      params: the new parameters; leaves other than the table are those of the old ones.
      coverage: how many of the vocabulary's words have a vector.
      kept: share of the vectors' squared length that their new width keeps.
    """

    params: Params
    coverage: Coverage
    kept: float


def words_of(tokenizer: Tokenizer) -> dict[int, str]:
    """The words of a vocabulary by id: entries that begin one, without their marks; no special ones.

    In a vocabulary of pieces, a piece that begins a word counts as the word that it spells alone.
    """
    starts = tokenizer.starts_word() & ~tokenizer.is_special()
    spelled = {i: tokenizer.decode([i], skip_special_tokens=False).strip() for i in np.flatnonzero(starts).tolist()}
    return {i: word for i, word in spelled.items() if word}


def _size(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def lay(params: Params, tokenizer: Tokenizer, vectors: WordVectors, rescale: bool = True) -> Laid:
    """Puts the vectors of words into their rows of the table; others stay as they are.

    Args:
      params: plain parameters of a family with a single token table.
      tokenizer: its vocabulary.
      vectors: vectors of any width.
      rescale: multiplies all vectors by one number, so that their mean square is that of the rows they replace, for
        which the layers above, and a tied output layer, are initialised.

    Raises:
      VectorsError: where there is no such table or several, it is structured (LoRA, int8), has fewer rows than the
        vocabulary, or no word has a vector.
    """
    tables = [(p, w) for p, w in paths.flatten(params, weights.is_node) if f"/{p}".endswith(f"/{TABLE}")]
    if len(tables) != 1:
        names = ", ".join(p for p, _ in tables) or f"none that ends in {TABLE}"
        raise VectorsError(f"vectors go into the one token table of a model; its tables: {names}")
    path, table = tables[0]
    if weights.is_node(table):
        raise VectorsError(f"{path} is a {type(table).__name__}: lay vectors in before it is adapted or quantized")
    words = words_of(tokenizer)
    if (last := max(words, default=0)) >= table.shape[0]:
        raise VectorsError(f"{path} has {table.shape[0]:,} rows, the tokenizer's word {words[last]!r} is {last:,}")
    found, coverage = look_up(list(words.values()), vectors)
    ids = np.array(list(words))[found >= 0]
    rows, kept = resize(vectors.matrix[found[found >= 0]], table.shape[1])
    if rescale:
        rows = rows * (_size(np.asarray(table)[ids]) / max(_size(rows), 1e-30))
    new = jnp.asarray(table).at[ids].set(jnp.asarray(rows, table.dtype))
    return Laid(weights.replace(params, path, lambda *_: new), coverage, kept)
