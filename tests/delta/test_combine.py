"""Sums of LoRAs: concatenation is exact, and the nearest of a smaller rank is what singular values say it is."""

import functools

import jax
import numpy as np
import pytest
import tiny_models
from delta_cells import filled
from tiny_models import noise

from llm_jax.compress.quantize import quantize
from llm_jax.delta import combine, dora, lora, node
from llm_jax.delta.lora import Lora, LoraConfig
from llm_jax.models.llama import LlamaConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.stack import unstack

LLAMA = LlamaConfig(vocab_size=31, context_length=16, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    hidden_dim=40)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
FACTORS = (0.75, -1.5, 2.0)
HOW = (
    LoraConfig(rank=3, alpha=6.0),
    LoraConfig(rank=1, ranks=("layers[1].mlp=4",), alphas=("layers[0].mlp=3",), targets=("mlp",)),
    LoraConfig(rank=2, targets=("layers[0].attention", "embed"), dropout=0.1),
)


@functools.cache
def base():
    return noise(LLAMA.make(), 0.3)


def adapted(params, config, seed):
    """With a random B, zero behind the real ranks."""
    return filled(lora.attach(params, config, jax.random.key(seed)), seed)


@functools.cache
def trees(quantized=False):
    params = quantize(base()) if quantized else base()
    return tuple(adapted(params, config, i) for i, config in enumerate(HOW))


def update_of(tree, path):
    """The update at a path in float64, of a LoRA with whatever scales."""
    w = dict(paths.flatten(tree, weights.is_node))[path]
    if not isinstance(w, Lora):
        return np.zeros(weights.shape_of(w))
    factor = np.asarray(combine.factor_of(w), np.float64)
    return factor[..., None, None] * (np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64))


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["sum", "weighted"])
@pytest.mark.parametrize("change", [lambda t: t, unstack], ids=["stacked", "unstacked"])
def test_the_update_of_a_concatenation_is_the_sum_of_the_updates(change, factors):
    each = [change(tree) for tree in trees()]
    found = combine.concatenated(each, factors)
    for path in node.of(found):
        want = sum(f * update_of(tree, path) for tree, f in zip(each, factors or (1, 1, 1), strict=True))
        np.testing.assert_allclose(update_of(found, path), want, rtol=0, atol=1e-6 * np.abs(want).max())
    paths_of = {path for tree in each for path in node.of(tree)}
    assert node.of(found).keys() == paths_of


def test_padding_moves_behind_the_real_columns():
    found = node.of(combine.concatenated(trees()))
    w = found["decoder/layers/mlp/up/kernel"]
    assert w.ranks == (3 + 1, 3 + 4) and w.a.shape[-1] == 7 and lora.count(w) == (4 + 7) * (24 + 40)
    assert not w.a[0, :, 4:].any() and not w.b[0, 4:].any() and w.b[0, :4].any(axis=-1).all()
    query = found["decoder/layers/attention/query/kernel"]
    assert query.ranks == (3 + 2, 3) and query.dropout == 0.1


def test_logits_of_a_concatenation_are_those_of_the_summed_matrices():
    for quantized in (False, True):
        each = trees(quantized)
        found = combine.concatenated(each, FACTORS)
        plain = jax.tree.map(weights.dense, node.detach(each[0]), is_leaf=weights.is_node)

        def added(path, x, each=each):
            return x + sum(f * update_of(t, path) for t, f in zip(each, FACTORS, strict=True)).astype(x.dtype)

        summed = paths.map_with_path(added, plain)
        want = np.asarray(tiny_models.logits(LLAMA, summed, IDS))
        got = tiny_models.logits(LLAMA, found, IDS)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_nearest_update_of_a_rank_leaves_the_smaller_singular_values():
    each = trees()[:2]
    exact, near = combine.concatenated(each, FACTORS[:2]), combine.weighted(each, FACTORS[:2], 2)
    for path, w in node.of(near).items():
        assert w.a.shape[-1] == 2
        want = update_of(exact, path)
        s = np.linalg.svd(want, compute_uv=False)
        error = np.linalg.norm(want - update_of(near, path), axis=(-2, -1))
        np.testing.assert_allclose(error, np.sqrt((s[:, 2:] ** 2).sum(-1)), rtol=1e-4, atol=1e-5)
    alone = combine.weighted(trees()[:1], [0.5])  # the largest rank of the trees by default: nothing is lost
    for path in node.of(alone):
        want = 0.5 * update_of(trees()[0], path)
        np.testing.assert_allclose(update_of(alone, path), want, rtol=0, atol=1e-6 * np.abs(want).max())
    by_default = node.of(combine.weighted(trees(), FACTORS))
    assert by_default["decoder/layers/mlp/up/kernel"].a.shape[-1] == 4


ERRORS = [
    (lambda: combine.concatenated([]), "0 factors for 0 trees"),
    (lambda: combine.concatenated(trees(), [1.0]), "1 factors for 3 trees"),
    (lambda: combine.concatenated([trees()[0], base()]), "tree 1 has no LoRA"),
    (lambda: combine.concatenated([trees()[0], dora.attach(trees()[1])]), "tree 1 carries DoRA at decoder/layers/mlp"),
    (lambda: combine.concatenated([trees()[0], unstack(trees()[1])]), "stack or unstack both"),
    (lambda: combine.concatenated([trees()[0], trees(True)[1]]), "tree 1 was made for another base"),
    (lambda: combine.weighted(trees(), FACTORS, 0), "rank=0 must be at least 1"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
