"""Plots of word vectors in two dimensions."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from llm_jax.classic.vectors.word_vectors import VectorsError

OFFSET = (4, 3)  # of a label from its point


def _checked(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or min(matrix.shape) < 2:
        raise VectorsError(f"a matrix {matrix.shape}: a plane needs two words at least, of two numbers at least")
    return matrix


def pca(matrix: np.ndarray) -> np.ndarray:
    """The two directions of most variance, by singular value decomposition.

    Args:
      matrix: `[V, D]`.

    Returns:
      Float64 `[V, 2]`, of mean 0. Signs are free: the largest loading of each direction is made positive.

    Raises:
      VectorsError: for fewer than two words or two dimensions.
    """
    matrix = _checked(matrix)
    centred = matrix - matrix.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    axes = directions[:2]
    signs = np.sign(axes[[0, 1], np.abs(axes).argmax(1)])
    return centred @ (axes * signs[:, None]).T


def tsne(matrix: np.ndarray, seed: int = 0) -> np.ndarray:
    """Keeps near words near: t-SNE by scikit-learn, on cosine distances.

    Source: van der Maaten and Hinton 2008, "Visualizing Data using t-SNE", https://jmlr.org/papers/v9/. The perplexity
    is 30, as scikit-learn's, and less for fewer than 91 words.

    Args:
      matrix: `[V, D]`.
      seed: of the beginning.

    Returns:
      Float64 `[V, 2]`.

    Raises:
      VectorsError: for fewer than two words or two dimensions, or where scikit-learn is not installed.
    """
    matrix = _checked(matrix)
    try:
        from sklearn.manifold import TSNE
    except ImportError as e:
        raise VectorsError("t-SNE needs scikit-learn: pip install scikit-learn, or take PCA") from e
    perplexity = min(30.0, (len(matrix) - 1) / 3)
    found = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(matrix)
    return np.asarray(found, np.float64)


def lifted(boxes: np.ndarray, most: float = 5.0) -> np.ndarray:
    """How far to move labels up so that none covers another.

    Args:
      boxes: left, bottom, right and top of each, `[V, 4]`.
      most: of its own heights; a label that would go further stays, as in a crowd.

    Returns:
      `[V]`, 0 for most.
    """
    out, placed = np.zeros(len(boxes)), np.zeros((0, 4))
    for i in np.argsort(boxes[:, 1], kind="stable"):
        left, bottom, right, top = boxes[i]
        height, up = top - bottom, 0.0
        beside = placed[(placed[:, 0] < right) & (left < placed[:, 2])]
        while len(under := beside[(beside[:, 1] < top + up) & (bottom + up < beside[:, 3])]):
            up = under[:, 3].max() - bottom
        out[i] = up if up <= most * height else 0.0
        placed = np.append(placed, [boxes[i] + [0, out[i], 0, out[i]]], axis=0)
    return out


def draw(
    words: Sequence[str], points: np.ndarray, path: epath.PathLike, arrows: Sequence[tuple[str, str]] = ()
) -> None:
    """Draws words in a plane.

    Args:
      words: V of them.
      points: `[V, 2]`.
      path: of the picture; its suffix says its format.
      arrows: pairs of words, as of an analogy: a dashed arrow from one to the other.

    Raises:
      VectorsError: for points of another shape, or an arrow with a word that is not drawn.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure  # no backend is chosen for the process, which may be a notebook's

    points = np.asarray(points, np.float64)
    if points.shape != (len(words), 2):
        raise VectorsError(f"points {points.shape} of {len(words):,} words: expected two numbers each")
    place = dict(zip(words, points, strict=True))
    if missing := [w for pair in arrows for w in pair if w not in place]:
        raise VectorsError(f"{missing[0]!r} of an arrow is not among the words drawn")
    figure = Figure(figsize=(10, 8))
    axes = figure.subplots()
    axes.scatter(*points.T, s=12)
    labels = [
        axes.annotate(word, point, xytext=OFFSET, textcoords="offset points", fontsize=9, parse_math=False)
        for word, point in zip(words, points, strict=True)
    ]
    for a, b in arrows:
        style = {"arrowstyle": "->", "linestyle": "--", "color": "gray", "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", place[b], place[a], arrowprops=style)
    axes.margins(0.08)
    axes.set(xticks=[], yticks=[])  # directions and lengths mean nothing by themselves
    figure.tight_layout()
    figure.draw_without_rendering()  # says how large labels are
    dot = figure.dpi / 72  # pixels a point
    ups = lifted(np.array([label.get_window_extent().extents for label in labels])) / dot
    offsets = OFFSET + ups[:, None] * [0, 1]
    for label, offset in zip(labels, offsets, strict=True):
        label.set_position(offset)
    moved = np.flatnonzero(ups)
    begins, to_pixels = points[moved], axes.transData
    ends = to_pixels.inverted().transform(to_pixels.transform(begins) + (offsets[moved] + [0, 1]) * dot)
    axes.add_collection(LineCollection(list(np.stack([begins, ends], 1)), colors="lightgray", zorder=0), False)
    with epath.Path(path).open("wb") as f:
        figure.savefig(f, dpi=120, format=epath.Path(path).suffix[1:] or "png")
