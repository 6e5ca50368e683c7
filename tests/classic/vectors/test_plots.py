"""Planes of word vectors, and pictures of them."""

import sys

import numpy as np
import pytest

from llm_jax.classic.vectors.plots import draw, lifted, pca, tsne
from llm_jax.classic.vectors.word_vectors import VectorsError


def test_pca():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 7)) * [5, 3, 1, 1, 1, 1, 1] + 10
    points = pca(matrix)
    covariance = np.cov(matrix.T, bias=True)
    want = np.sort(np.linalg.eigvalsh(covariance))[::-1][:2]
    np.testing.assert_allclose(points.T @ points / 50, np.diag(want), atol=1e-10)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(pca(matrix[:, ::-1]), points, atol=1e-10)  # signs do not hang on chance
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    np.testing.assert_allclose(np.abs(pca(matrix @ rotation)), np.abs(points), atol=1e-10)


def test_picture(tmp_path):
    """Words that matplotlib would take for formulas, arrows, another format."""
    words = ["$", "$\\frac$", "king", "queen"]
    points = np.random.default_rng(0).normal(size=(4, 2))
    draw(words, points, tmp_path / "a.png", arrows=[("king", "queen")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(words, points, tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_bad_input(tmp_path, monkeypatch):
    for shape in ((1, 5), (5, 1), (5,)):
        for plane in (pca, tsne):
            with pytest.raises(VectorsError, match="a plane needs two words at least, of two numbers at least"):
                plane(np.ones(shape))
    with pytest.raises(VectorsError, match=r"points \(3, 2\) of 2 words"):
        draw(["a", "b"], np.ones((3, 2)), tmp_path / "a.png")
    with pytest.raises(VectorsError, match="'c' of an arrow is not among the words drawn"):
        draw(["a", "b"], np.ones((2, 2)), tmp_path / "a.png", [("a", "c")])
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(VectorsError, match="t-SNE needs scikit-learn: pip install scikit-learn, or take PCA"):
        tsne(np.ones((5, 5)))


def test_labels_that_would_cover_one_another_move_up():
    boxes = np.array([[0, 0, 4, 1], [2, 0.5, 6, 1.5], [5, 0.8, 9, 1.8], [20, 0, 24, 1], [3, 9, 5, 10]], float)
    ups = lifted(boxes)
    np.testing.assert_allclose(ups, [0, 0.5, 1.2, 0, 0])
    moved = boxes + ups[:, None] * [0, 1, 0, 1]
    for i, a in enumerate(moved):
        for b in moved[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert lifted(np.repeat(boxes[:1], 9, axis=0)).tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]  # a crowd
    assert lifted(np.zeros((0, 4))).shape == (0,)
